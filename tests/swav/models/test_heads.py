import torch

from swav.models.heads import ProjectionHead, Prototypes


def test_embeddings_have_unit_norm_and_fp32_even_under_autocast() -> None:
    head = ProjectionHead(16, 32, 8, batch_norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = head(torch.randn(6, 16))
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))


def test_the_head_of_the_widest_model_has_no_batch_norm() -> None:
    names = [name for name, _ in ProjectionHead(16, 32, 8, batch_norm=False).named_parameters()]
    assert not any(name.startswith("norm") for name in names)


def test_every_head_scores_every_embedding_in_fp32() -> None:
    prototypes = Prototypes(5, 8, num_heads=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = prototypes(torch.randn(4, 8))
    assert [(tuple(head.shape), head.dtype) for head in scores] == [((4, 5), torch.float32)] * 3


def test_normalize_brings_prototypes_to_unit_norm() -> None:
    prototypes = Prototypes(5, 8)
    with torch.no_grad():
        prototypes.heads[0].mul_(7)
    prototypes.normalize()
    torch.testing.assert_close(prototypes.heads[0].norm(dim=1), torch.ones(5))
