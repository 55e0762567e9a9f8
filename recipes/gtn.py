"""The comparisons of GTN: Binici et al., "Generalizing Teacher Networks for Effective Knowledge Distillation Across
Student Architectures" (arXiv 2407.16040).

Its tables hold vanilla, SFTN and GTN teachers against each other: one SFTN teacher a student, one vanilla and one GTN
teacher for all. They are named by what they compare. Students are drawn at random there; the paper leaves both open.
"""

from recipes.rows import Row, Table, Teacher

PAPER = "GTN (arXiv 2407.16040)"
RANDOM = ["pool:1", "pool:2", "pool:3", "pool:4", "pool:5"]
NAS = ["nas_s", "nas_m", "nas_l"]
BRANCHES = {"alpha": 1.0, "freeze_teacher_epochs": 60}  # on ImageNet-200


def cifar100(model: str, student: str) -> list[Teacher]:
    """The three teachers of a student: vanilla, SFTN, GTN."""
    return [
        Teacher("cifar100", model),
        Teacher("cifar100", model, "sftn", {"student": student}),
        Teacher("cifar100", model, "gtn"),
    ]


def imagenet200(student: str) -> list[Teacher]:
    """EfficientNet-B0 from ImageNet's weights: adapted to the 200 classes, then trained by each of the methods."""
    name, constant = "efficientnet_b0", {"lr_schedule": "constant"}
    adapted = Teacher("imagenet200_teacher", name, "vanilla", {"pretrained": True, "epochs": 15, **constant})
    return [
        Teacher("imagenet200_teacher", name, "vanilla", {"epochs": 35, **constant}, adapted),
        Teacher("imagenet200_teacher", name, "sftn", {"student": student, **BRANCHES}, adapted),
        Teacher("imagenet200_teacher", name, "gtn", BRANCHES, adapted),
    ]


def students(names: list[str], methods: tuple[str, ...] = ("kd",)) -> list[Row]:
    """Students on CIFAR-100 from ResNet-32 and WRN-40-2: alone, by KD from the three teachers, and by the other
    methods, which are given the vanilla teacher (supplement, section 2)."""
    rows = [Row("cifar100_kd", None, name, "none") for name in names]
    for model in ("resnet32", "wrn40_2"):
        for name in names:
            vanilla, *friendly = cifar100(model, name)
            rows += [Row("cifar100_kd", vanilla, name, method) for method in methods]
            rows += [Row("cifar100_kd", teacher, name) for teacher in friendly]
    return rows


def tables() -> dict[str, Table]:
    """The paper's comparisons by name."""
    large = [Row("imagenet200_kd", None, name, "none") for name in RANDOM]
    large += [Row("imagenet200_kd", teacher, name) for name in RANDOM for teacher in imagenet200(name)]
    figure = [Row("cifar100", Teacher("cifar100", "resnet32", "gtn"))]
    mean = "the paper's mean gain of GTN over vanilla KD is"
    return {
        "gtn/random": Table(PAPER, f"CIFAR-100: random students of the pool by KD; {mean} 2.66", students(RANDOM)),
        "gtn/nas": Table(PAPER, "CIFAR-100: the three students found by architecture search, by KD", students(NAS)),
        "gtn/methods": Table(
            PAPER, "CIFAR-100: GTN against DKD and SCKD from vanilla teachers", students(RANDOM, ("kd", "dkd", "sckd"))
        ),
        "gtn/imagenet200": Table(PAPER, f"ImageNet-200: random students of the pool by KD; {mean} 1.99", large),
        "gtn/figure1": Table(
            PAPER,
            "Supplement, Figure 1: the accuracy of ResNet-32 and of its branches by epoch",
            figure,
            drawing="branches",
        ),
    }
