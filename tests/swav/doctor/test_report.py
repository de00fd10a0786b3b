import json

from swav.doctor.report import Finding, Member, differing, failed, judged, name_ranks, passed, skipped, table, to_json

RANKS = [Member(rank, f"host-{rank // 2}", rank % 2) for rank in range(8)]


def test_a_figure_is_compared_with_its_limits() -> None:
    assert judged("x", 3.0, unit="s", remedy="do") == Finding(name="x", status="pass", measured=3.0, unit="s")
    low = judged("x", 3.0, at_least=4, unit="s", remedy="do")
    assert (low.status, low.limit, low.remedy) == ("fail", "at least 4", "do")
    assert judged("x", 4.0, at_least=4, unit="s", remedy="do").status == "pass"
    assert judged("x", 3.0, at_most=2, unit="s", remedy="do").limit == "at most 2"
    assert judged("x", 3.0, at_most=2, unit="s", remedy="do").status == "fail"


def test_ranks_are_named_with_their_hosts() -> None:
    assert name_ranks([RANKS[3]]) == "rank 3 (host host-1)"
    assert name_ranks([RANKS[5], RANKS[0], RANKS[1]]) == "ranks 0-1, 5 (hosts host-0, host-2)"
    many = [Member(rank, f"h{rank}", 0) for rank in range(20)]
    assert name_ranks(many).endswith("h6, h7 and 12 more)")


def test_equal_failures_are_told_once() -> None:
    told = {RANKS[0]: {"errors": {"x": "no"}}, RANKS[1]: {"errors": {"x": "no"}}, RANKS[2]: {"errors": {"y": "other"}}}
    found = failed("x", told, "do")
    assert found is not None
    assert found.reason == "ranks 0-1 (host host-0): no"
    assert (found.status, found.remedy) == ("fail", "do")
    assert failed("z", told, "do") is None


def test_the_rank_that_differs_is_named() -> None:
    values = dict.fromkeys(RANKS, "a")
    same = differing("x", values, remedy="do")
    assert (same.status, same.measured) == ("pass", "a")
    found = differing("x", values | {RANKS[3]: "b"}, remedy="do")
    assert found.status == "fail"
    assert found.reason == "rank 3 (host host-1): b; the other ranks (7): a"


def test_the_table_says_why_and_what_to_do() -> None:
    findings = [
        judged("a", 12345.6, at_least=2000, unit="MB/s", remedy="do"),
        Finding(name="b", status="fail", reason="because", remedy="mend"),
        skipped("c", "not here"),
    ]
    lines = table(findings).splitlines()
    assert lines[1].split() == ["a", "pass", "12,346", "MB/s", "at", "least", "2,000", "MB/s"]
    assert lines[2].split()[:2] == ["b", "FAIL"]
    assert lines[3:5] == ["    why: because", "    do:  mend"]
    assert lines[5].split()[:2] == ["c", "skipped"]
    assert lines[-1] == "1 passed, 1 failed, 1 skipped"
    assert not passed(findings)
    assert passed([findings[0], findings[2]])


def test_the_report_is_json() -> None:
    whole = json.loads(
        json.dumps(to_json([skipped("c", "why")], {RANKS[1]: {"host": {"cores": 2}}}, {"world_size": 2}))
    )
    assert whole["passed"]
    assert whole["world_size"] == 2
    assert whole["findings"][0]["name"] == "c"
    assert whole["ranks"] == [{"rank": 1, "host": "host-0", "measured": {"host": {"cores": 2}}}]
