"""The jobs: ``torchx run -s local_cwd swav.pretrain --recipe demo``, and the same with any other scheduler.

TorchX lists every function of this module as a component, so there is nothing else here.
"""

from typing import List, Optional

from torchx import specs

from swav_components import roles


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
    """
    return specs.AppDef(
        name="swav-pretrain",
        roles=[
            roles.pretrain(
                recipe,
                overrides,
                data=data,
                output=output,
                j=j,
                image=image,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB),
            )
        ],
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
    workers: int = 1,
    assign_image: str = roles.ASSIGN_IMAGE,
    assign_cpu: int = 2,
    assign_gpu: int = 0,
    assign_memMB: int = 8192,
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
        workers: processes of the assigner, e.g. one per GPU
        assign_image: container image of the assigner
        assign_cpu: cores of the assigner
        assign_gpu: GPUs of the assigner
        assign_memMB: memory of the assigner
    """
    return specs.AppDef(
        name="swav-deepclusterv2",
        roles=[
            roles.trainer(
                "deepclusterv2",
                recipe,
                overrides,
                data=data,
                output=output,
                j=j,
                image=image,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB),
            ),
            roles.assigner(
                roles.run_folder(recipe, output),
                data=data,
                workers=workers,
                image=assign_image,
                resource=specs.resource(cpu=assign_cpu, gpu=assign_gpu, memMB=assign_memMB),
            ),
        ],
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
    workers: int = 1,
    assign_image: str = roles.ASSIGN_IMAGE,
    assign_cpu: int = 2,
    assign_gpu: int = 0,
    assign_memMB: int = 8192,
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
        workers: processes of the assigner, e.g. one per GPU
        assign_image: container image of the assigner
        assign_cpu: cores of the assigner
        assign_gpu: GPUs of the assigner
        assign_memMB: memory of the assigner
    """
    return specs.AppDef(
        name="swav-selav2",
        roles=[
            roles.trainer(
                "selav2",
                recipe,
                overrides,
                data=data,
                output=output,
                j=j,
                image=image,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB),
            ),
            roles.assigner(
                roles.run_folder(recipe, output),
                data=data,
                workers=workers,
                image=assign_image,
                resource=specs.resource(cpu=assign_cpu, gpu=assign_gpu, memMB=assign_memMB),
            ),
        ],
    )


def assign(
    output: str,
    data: Optional[str] = None,
    workers: int = 1,
    image: str = roles.ASSIGN_IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
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
    """
    return specs.AppDef(
        name="swav-assign",
        roles=[
            roles.assigner(
                output,
                data=data,
                workers=workers,
                image=image,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB),
            )
        ],
    )


def knn(
    backbone: str,
    train: str,
    test: Optional[str] = None,
    output: Optional[str] = None,
    k: Optional[List[int]] = None,
    image: str = roles.IMAGE,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
) -> specs.AppDef:
    """Judge a backbone by its nearest neighbours (appendix B.6).

    Args:
        backbone: file of the backbone
        train: labelled images that vote: a folder of images or of webdataset tars
        test: labelled images to classify; without them each image of train is classified by the others
        output: file for the result
        k: numbers of neighbours, e.g. 20,200
        image: container image, where the scheduler uses one
        cpu: cores
        gpu: GPUs
        memMB: memory
    """
    return specs.AppDef(
        name="swav-knn",
        roles=[
            roles.knn(
                backbone,
                train,
                test=test,
                output=output,
                num_neighbors=k,
                image=image,
                resource=specs.resource(cpu=cpu, gpu=gpu, memMB=memMB),
            )
        ],
    )
