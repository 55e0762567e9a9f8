"""The tables of "How to Train the Teacher Model for Effective Knowledge Distillation" (ECCV 2024, arXiv 2407.18041).

Supplement, section 2: loss CE + gamma distillation, the gammas of the methods' own papers, which are the defaults;
ReviewKD's and DKD's are chosen from sets, so there is a row for each. Of DKD gamma is read as eq. 24 prints it, the
weight of the whole term (--method_weights), with the classes' weights as they are (--dkd_beta). The schedule is not
given there: it is that of the others on CIFAR-100. Its tables print variances, no accuracies. Of zero-shot distillation
it says that the settings are the same; how many classes are left out, which, and the networks are guesses, as is all of
the binary case.
"""

from recipes.rows import Row, Table, Teacher, slow

PAPER = "MSE teachers (arXiv 2407.18041)"
PAIRS = {
    1: "resnet56 resnet20, resnet110 resnet20, resnet110 resnet32, wrn40_2 wrn16_2, wrn40_2 wrn40_1, vgg13 vgg8",
    2: "resnet50 mobilenetv2, resnet50 vgg8, resnet32x4 shufflenetv1, resnet32x4 shufflenetv2, wrn40_2 shufflenetv1, "
    "vgg13 mobilenetv2",
}
METHODS = ["kd", "at", "pkt", "sp", "cc", "rkd", "vid", "crd", "reviewkd", "dkd", "hsakd"]
PAIR = "resnet56", "resnet20"  # of the zero-shot and the binary case
CLASSES, LEFT_OUT = 100, (10, 25)  # of CIFAR-100 the last ones
GAMMAS = {"reviewkd": (0.6, 1.0, 5.0, 8.0), "dkd": (0.2, 1.0, 2.0, 4.0, 8.0)}


def both(recipe: str, model: str) -> list[Teacher]:
    """A teacher trained by cross-entropy and one by the squared error."""
    return [Teacher(recipe, model), Teacher(recipe, model, "mse")]


def pairs(number: int) -> list[Row]:
    """Each student by each method, from either teacher."""
    rows = []
    for pair in PAIRS[number].split(", "):
        model, student = pair.split()
        for teacher in both("cifar100", model):
            for method in METHODS:
                weights = [{"method_weights": [gamma]} for gamma in GAMMAS.get(method, ())] or [{}]
                rows += [Row("cifar100", teacher, student, method, slow(student) | each) for each in weights]
    return rows


def zero_shot() -> list[Row]:
    """By KD without the images of some classes, which the teachers have seen."""
    model, student = PAIR
    return [
        Row("cifar100", teacher, student, "kd", {"exclude_classes": [*range(CLASSES - count, CLASSES)]}, {}, label)
        for count in LEFT_OUT
        for label in (f"kd without {count} classes",)
        for teacher in both("cifar100", model)
    ]


def binary() -> list[Row]:
    """Alone and by KD where there are two classes."""
    model, student = PAIR
    alone = Row("cifar10_binary", None, student, "none")
    return [alone, *(Row("cifar10_binary", teacher, student) for teacher in both("cifar10_binary", model))]


def tables() -> dict[str, Table]:
    """Tables 1 and 2 of the supplement, which are the paper's Table 1, and its other cases."""
    title = "Table {} of the supplement, CIFAR-100: teachers by cross-entropy and by squared error, {} architectures"
    return {
        "mse/1": Table(PAPER, title.format(1, "the same"), pairs(1)),
        "mse/2": Table(PAPER, title.format(2, "different"), pairs(2)),
        "mse/zero_shot": Table(PAPER, "CIFAR-100: students that never saw some of the classes", zero_shot()),
        "mse/binary": Table(PAPER, "CIFAR-10: vehicles against animals", binary()),
    }
