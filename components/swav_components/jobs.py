"""The jobs: ``torchx run -s local_cwd swav.pretrain --recipe demo``, and the same with any other scheduler.

TorchX lists every function of this module as a component, so there is nothing else here.
"""

from typing import List, Optional

from torchx import specs

from swav_components import evaluators, roles


def pretrain(
    *overrides: str,
    recipe: str,
    data: Optional[str] = None,
    output: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Pretrain a backbone.

    Args:
        overrides: settings of the recipe to change, as key=value, e.g. optim.epochs=100
        recipe: name of the run, e.g. demo or swav_r50_2x224_6x96_200ep
        data: images to train on: a folder of images or of webdataset tars
        output: folder for checkpoints, metrics and the backbone
        j: [[<min nodes>:]<nodes>x]<processes per node>, e.g. 8x8, or 4:8x8 to go on with 4 of 8 nodes
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache of images
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-pretrain",
        name,
        roles.pretrain(
            recipe,
            overrides,
            data=data,
            output=output,
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def deepclusterv2(
    *overrides: str,
    recipe: str,
    data: Optional[str] = None,
    output: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    workers: int = 1,
    assign_image: str = roles.ASSIGN_IMAGE,
    assign_cpu: int = 2,
    assign_gpu: int = 0,
    assign_memMB: int = 8192,
    assign_disk_gb: int = 50,
    assign_timeout_hours: Optional[float] = None,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Pretrain a backbone by DeepCluster-v2: a trainer, and beside it an assigner that makes the labels (appendix D).

    Args:
        overrides: settings of the recipe to change, as key=value, e.g. optim.epochs=100
        recipe: name of the run, e.g. deepclusterv2_r50_2x224_400ep
        data: images to train on: a folder of images or of webdataset tars
        output: folder for all that both sides write; both must reach it, so s3://bucket/prefix where they share no disk
        j: nodes and processes of the trainer, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 8x8
        image: container image of the trainer, where the scheduler uses one
        cpu: cores per node of the trainer
        gpu: GPUs per node of the trainer
        memMB: memory per node of the trainer
        disk_gb: disk per node of the trainer, for the cache of images
        workers: processes of the assigner, e.g. one per GPU
        assign_image: container image of the assigner
        assign_cpu: cores of the assigner
        assign_gpu: GPUs of the assigner
        assign_memMB: memory of the assigner
        assign_disk_gb: disk of the assigner, for features and labels
        assign_timeout_hours: for which the assigner waits for features (24 where none is given)
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-deepclusterv2",
        name,
        roles.trainer(
            "deepclusterv2",
            recipe,
            overrides,
            data=data,
            output=output,
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
        roles.assigner(
            roles.run_folder(recipe, output),
            data=data,
            workers=workers,
            timeout_hours=assign_timeout_hours,
            node=roles.Node(assign_image, assign_cpu, assign_gpu, assign_memMB, assign_disk_gb),
        ),
    )


def selav2(
    *overrides: str,
    recipe: str,
    data: Optional[str] = None,
    output: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    workers: int = 1,
    assign_image: str = roles.ASSIGN_IMAGE,
    assign_cpu: int = 2,
    assign_gpu: int = 0,
    assign_memMB: int = 8192,
    assign_disk_gb: int = 50,
    assign_timeout_hours: Optional[float] = None,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Pretrain a backbone by SeLa-v2: a trainer, and beside it an assigner that makes the labels (appendix D).

    Args:
        overrides: settings of the recipe to change, as key=value, e.g. optim.epochs=100
        recipe: name of the run, e.g. selav2_r50_2x224_400ep
        data: images to train on: a folder of images or of webdataset tars
        output: folder for all that both sides write; both must reach it, so s3://bucket/prefix where they share no disk
        j: nodes and processes of the trainer, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 8x8
        image: container image of the trainer, where the scheduler uses one
        cpu: cores per node of the trainer
        gpu: GPUs per node of the trainer
        memMB: memory per node of the trainer
        disk_gb: disk per node of the trainer, for the cache of images
        workers: processes of the assigner, e.g. one per GPU
        assign_image: container image of the assigner
        assign_cpu: cores of the assigner
        assign_gpu: GPUs of the assigner
        assign_memMB: memory of the assigner
        assign_disk_gb: disk of the assigner, for features and labels
        assign_timeout_hours: for which the assigner waits for features (24 where none is given)
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-selav2",
        name,
        roles.trainer(
            "selav2",
            recipe,
            overrides,
            data=data,
            output=output,
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
        roles.assigner(
            roles.run_folder(recipe, output),
            data=data,
            workers=workers,
            timeout_hours=assign_timeout_hours,
            node=roles.Node(assign_image, assign_cpu, assign_gpu, assign_memMB, assign_disk_gb),
        ),
    )


def assign(
    output: str,
    data: Optional[str] = None,
    workers: int = 1,
    image: str = roles.ASSIGN_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    timeout_hours: Optional[float] = None,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Make the labels of a DeepCluster-v2 or SeLa-v2 run whose trainer works elsewhere (appendix D).

    Args:
        output: folder of the run, as its trainer has it
        data: the run's images, where they are found elsewhere than by the trainer
        workers: processes, e.g. one per GPU
        image: container image, where the scheduler uses one
        cpu: cores
        gpu: GPUs
        memMB: memory
        disk_gb: disk, for features and labels
        timeout_hours: for which it waits for features (24 where none is given)
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-assign",
        name,
        roles.assigner(
            output,
            data=data,
            workers=workers,
            timeout_hours=timeout_hours,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def linear(
    *overrides: str,
    backbone: str,
    train: str,
    test: str,
    recipe: str,
    output: Optional[str] = None,
    work: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.EVAL_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Judge a backbone by a linear classifier on its frozen features (appendices A.3 and A.5).

    Args:
        overrides: settings of the protocol to change, as key=value, e.g. learning_rates=[0.1,0.3,1]
        backbone: file of the backbone, of any layout, or folder of a run
        train: labelled images to learn from: a folder of images or of webdataset tars
        test: labelled images to classify
        recipe: name of the protocol, e.g. linear_imagenet, linear_places205 or linear_inat18
        output: file for the result
        work: folder for features and checkpoints, kept for other evaluations (default: OUTPUT.work, removed)
        j: nodes and processes, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 1x8
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-linear",
        name,
        evaluators.protocol(
            "linear",
            recipe,
            overrides,
            files=evaluators.Files(backbone, train, test, output, work),
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def finetune(
    *overrides: str,
    backbone: str,
    train: str,
    test: str,
    recipe: str,
    output: Optional[str] = None,
    work: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.EVAL_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Judge a backbone by fine-tuning it on few labels (appendix A.4).

    Args:
        overrides: settings of the protocol to change, as key=value, e.g. subset.names=s3://bucket/1percent.txt
        backbone: file of the backbone, of any layout, or folder of a run
        train: labelled images to learn from: a folder of images or of webdataset tars, of which it takes few
        test: labelled images to classify
        recipe: name of the protocol, e.g. semisup_1pct or semisup_10pct
        output: file for the result
        work: folder for features and checkpoints, kept for other evaluations (default: OUTPUT.work, removed)
        j: nodes and processes, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 1x8
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-finetune",
        name,
        evaluators.protocol(
            "finetune",
            recipe,
            overrides,
            files=evaluators.Files(backbone, train, test, output, work),
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def lowshot(
    *overrides: str,
    backbone: str,
    train: str,
    test: str,
    recipe: str,
    output: Optional[str] = None,
    work: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.EVAL_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Judge a backbone by fine-tuning it on some images of each class (appendix B.5).

    Args:
        overrides: settings of the protocol to change, as key=value, e.g. subset.per_class=50
        backbone: file of the backbone, of any layout, or folder of a run
        train: labelled images to learn from: a folder of images or of webdataset tars, of which it takes few
        test: labelled images to classify
        recipe: name of the protocol: lowshot_13 or lowshot_128, and with _scratch behind it without pretraining
        output: file for the result
        work: folder for features and checkpoints, kept for other evaluations (default: OUTPUT.work, removed)
        j: nodes and processes, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 1x8
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-lowshot",
        name,
        evaluators.protocol(
            "lowshot",
            recipe,
            overrides,
            files=evaluators.Files(backbone, train, test, output, work),
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def svm(
    *overrides: str,
    backbone: str,
    train: str,
    test: str,
    recipe: str = "svm_voc07",
    output: Optional[str] = None,
    work: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.EVAL_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Judge a backbone by linear SVMs on its frozen features (appendix A.5, VOC07).

    Args:
        overrides: settings of the protocol to change, as key=value, e.g. costs=[0.25,1]
        backbone: file of the backbone, of any layout, or folder of a run
        train: labelled images to learn from: a folder of images or of webdataset tars
        test: labelled images to classify
        recipe: name of the protocol
        output: file for the result
        work: folder for features and checkpoints, kept for other evaluations (default: OUTPUT.work, removed)
        j: nodes and processes, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 1x8
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-svm",
        name,
        evaluators.protocol(
            "svm",
            recipe,
            overrides,
            files=evaluators.Files(backbone, train, test, output, work),
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def knn(
    *overrides: str,
    backbone: str,
    train: str,
    test: Optional[str] = None,
    recipe: str = "knn",
    k: Optional[List[int]] = None,
    output: Optional[str] = None,
    work: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.EVAL_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Judge a backbone by its nearest neighbours (appendix B.6).

    Args:
        overrides: settings of the protocol to change, as key=value, e.g. temperature=0.1
        backbone: file of the backbone, of any layout, or folder of a run
        train: labelled images that vote: a folder of images or of webdataset tars
        test: labelled images to classify; without them each image of train is classified by the others
        recipe: name of the protocol: knn, knn_20 or knn_200
        k: numbers of neighbours, e.g. 20,200
        output: file for the result
        work: folder for features and checkpoints, kept for other evaluations (default: OUTPUT.work, removed)
        j: nodes and processes, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 1x8
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-knn",
        name,
        evaluators.protocol(
            "knn",
            recipe,
            [*evaluators.neighbours(k), *overrides],
            files=evaluators.Files(backbone, train, test, output, work),
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def evaluate(
    *overrides: str,
    backbone: str,
    data: str,
    output: str,
    protocols: Optional[List[str]] = None,
    pretraining: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.EVAL_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Judge a backbone by all protocols whose images are there, side by side, and write the paper's table of it.

    Args:
        overrides: settings to change, as key=value of all protocols or PROTOCOL:key=value of one
        backbone: file of the backbone, of any layout, or folder of a run
        data: folder of imagenet/train, imagenet/val, places205/..., inat18/..., voc07/trainval and voc07/test
        output: file for the table; the result of each protocol goes into a folder of its name
        protocols: names of protocols, e.g. knn,linear_imagenet (default: those of the paper's tables)
        pretraining: recipe of the backbone, by which its row of the paper is found
        j: nodes and processes of each protocol, [[<min nodes>:]<nodes>x]<processes per node>, e.g. 1x8
        image: container image, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node, for the cache
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-evaluate",
        name,
        *evaluators.table(
            overrides,
            files={"backbone": backbone, "data": data, "output": output},
            protocols=protocols,
            pretraining=pretraining,
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def shards(
    source: str,
    out: str,
    samples_per_shard: Optional[int] = None,
    bytes_per_shard: Optional[int] = None,
    shuffle: Optional[int] = None,
    image: str = roles.IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Write images as webdataset shards with an index.

    Args:
        source: folder of images, flat or one subfolder per class; .csv or .jsonl list of them; or tars
        out: new folder for the shards, local or s3://bucket/prefix
        samples_per_shard: images per shard
        bytes_per_shard: bytes per shard
        shuffle: seed to shuffle the images by; without one they stay in sorted order
        image: container image, where the scheduler uses one
        cpu: cores
        gpu: GPUs
        memMB: memory
        disk_gb: disk, for shards that are being written
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-shards",
        name,
        roles.shards(
            source,
            out,
            options=[
                *roles.option("samples-per-shard", samples_per_shard),
                *roles.option("bytes-per-shard", bytes_per_shard),
                *roles.option("shuffle", shuffle),
            ],
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )


def doctor(
    *options: str,
    output: str,
    data: Optional[str] = None,
    j: str = "1x1",
    image: str = roles.IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    disk_gb: int = 50,
    name: Optional[str] = None,
) -> specs.AppDef:
    """Check the nodes of a long run before it: storage, collectives, clocks, disks, and that all have one image.

    Args:
        options: further options of python -m swav.doctor, after --, e.g. --recipe demo --min-free-disk-gb 100
        output: folder that the run would write
        data: images of the run
        j: nodes and processes of the run, [[<min nodes>:]<nodes>x]<processes per node>
        image: container image of the run, where the scheduler uses one
        cpu: cores per node
        gpu: GPUs per node
        memMB: memory per node
        disk_gb: disk per node
        name: of the job, in lower-case letters, digits and dashes, so that a second submission is recognised
    """
    return roles.app(
        "swav-doctor",
        name,
        roles.doctor(
            output,
            data=data,
            options=options,
            j=j,
            node=roles.Node(image, cpu, gpu, memMB, disk_gb),
        ),
    )
