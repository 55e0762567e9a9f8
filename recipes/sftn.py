"""The tables of SFTN: Park et al., "Learning Student-Friendly Teacher Networks" (NeurIPS 2021, arXiv 2102.07650).

FitNets, AT, SP, VID, RKD, PKT, AB, FT and OH are joined with KD (section 4.1): kd_weight is 1 beside them. Branches
have alpha 3 and temperature 1, the defaults, unless a row says otherwise. Tables 10 to 12 and the other figures show
architectures.
"""

from recipes.rows import Row, Table, Teacher, figures, grid, slow

PAPER = "SFTN (arXiv 2102.07650)"
JOINED = {"fitnets", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "oh"}

# Teacher, student, and below a standard and an SFTN column for each of them; of `none` one number a pair.
PAIRS = {
    1: ["wrn40_2 wrn16_2", "wrn40_2 wrn40_1", "resnet32x4 resnet8x4", "resnet32x4 resnet8x2"],
    2: ["resnet32x4 shufflenetv1", "resnet32x4 shufflenetv2", "resnet50 vgg8", "wrn40_2 shufflenetv2"],
}
TABLES = {
    1: """
        teacher 76.30 78.20  76.30 77.62  79.25 79.41  79.25 77.89
        none    73.41        72.16        72.38        68.19
        kd      75.46 76.25  73.73 75.09  73.39 76.09  67.43 69.17
        fitnets 75.72 76.73  74.14 75.54  75.34 76.89  69.80 71.07
        at      75.85 76.82  74.56 75.86  74.98 76.91  68.79 70.90
        sp      75.43 76.77  74.51 75.31  74.06 76.37  68.39 70.03
        vid     75.63 76.79  74.21 75.76  74.86 77.00  69.53 71.08
        rkd     75.48 76.49  73.86 75.11  74.12 76.62  68.54 70.91
        pkt     75.71 76.57  74.43 75.49  74.70 76.57  69.29 70.75
        ab      70.12 70.76  74.38 75.51  74.73 76.51  69.76 71.05
        ft      75.60 76.51  74.49 75.11  74.89 77.02  69.70 71.11
        crd     75.91 77.23  74.93 76.09  75.54 76.95  70.34 71.34
        sskd    75.96 76.80  75.72 76.03  75.95 76.85  69.34 70.29
        oh      76.00 76.39  74.79 75.62  75.04 76.65  68.10 69.69
    """,
    2: """
        teacher 79.25 80.03  79.25 79.58  78.70 82.52  76.30 78.21
        none    71.95        73.21        71.12        73.21
        kd      74.26 77.93  75.25 78.07  73.82 74.92  76.68 78.06
        fitnets 75.95 78.75  77.00 79.68  73.22 74.80  77.31 79.21
        at      76.12 78.63  76.57 78.79  73.56 74.05  77.41 78.29
        sp      75.80 78.36  76.11 78.38  74.02 75.37  76.93 78.12
        vid     75.16 78.03  75.70 78.49  73.59 74.76  77.27 78.78
        rkd     74.84 77.72  75.48 77.77  73.54 74.70  76.69 78.11
        pkt     75.05 77.46  75.79 78.28  73.79 75.17  76.86 78.28
        ab      75.95 78.53  76.25 78.68  73.72 74.77  77.28 78.77
        ft      75.58 77.84  76.42 78.37  73.34 74.77  76.80 77.65
        crd     75.60 78.20  76.35 78.43  74.52 75.41  77.52 78.81
        sskd    78.05 79.10  78.66 79.65  76.03 76.95  77.81 78.34
        oh      77.51 79.56  78.08 79.98  74.55 75.95  77.82 79.14
    """,
}
TOP1 = """
    teacher 76.45 77.43
    kd      73.55 74.14
    fitnets 74.56 75.01
    sp      74.95 75.53
    crd     75.01 75.39
    oh      74.56 75.01
"""
TOP5 = """
    teacher 93.15 93.75
    kd      91.81 92.21
    fitnets 92.31 92.51
    sp      92.54 92.69
    crd     92.56 92.67
    oh      92.36 92.56
"""
ALIKE = """
    kd      1.10 0.47 0.88 0.95
    fitnets 0.79 0.38 0.89 0.95
    sp      0.95 0.45 0.89 0.95
    vid     0.88 0.45 0.88 0.95
    crd     0.81 0.43 0.88 0.95
    sskd    0.54 0.26 0.92 0.97
    oh      0.85 0.37 0.90 0.96
"""
OTHERS = ["wrn40_2 wrn16_2", "wrn40_2 wrn40_1", "resnet32x4 resnet8x4", "resnet32x4 shufflenetv1"]
OTHERS += ["resnet32x4 shufflenetv2", "resnet50 vgg8"]
TABLE4 = """
    teacher           76.30 76.30 79.25 79.25 79.25 78.70
    none              73.41 72.16 72.38 71.95 73.21 71.12
    Standard          75.46 73.73 73.39 74.26 75.25 73.82
    DML               75.30 74.08 74.34 73.37 73.80 73.01
    KDCL              75.45 74.65 75.21 73.98 74.30 73.48
    RCO-one-stage-EEI 75.36 74.29 74.06 76.62 77.40 74.30
    SFTN              76.25 75.09 76.09 77.93 78.07 74.92
    RCO-EEI-4         75.69 74.87 73.73 76.97 76.89 74.24
    SFTN-4            76.96 76.31 76.67 79.11 78.95 75.52
"""
ABLATED = ["resnet32x4 shufflenetv1", "resnet32x4 shufflenetv2", "wrn40_2 wrn16_2", "wrn40_2 wrn40_1"]
TABLE5 = """
    1  81.19 80.26 78.23 78.14  76.05 77.18 76.30 74.75
    5  81.23 81.56 79.22 78.31  75.36 75.59 76.31 73.64
    10 81.27 81.98 78.81 78.38  74.47 75.93 75.85 73.62
    15 81.89 81.74 79.27 78.63  74.78 75.65 75.79 73.49
    20 81.60 81.70 78.84 78.45  74.62 75.88 75.82 74.03
"""
TABLE6 = """
    1        81.19 80.26 78.23 78.14  76.05 77.18 76.30 74.75
    3        78.70 79.80 77.83 77.57  77.36 78.56 76.20 74.71
    6        78.29 78.29 77.28 76.05  77.33 77.70 76.02 74.67
    10       73.02 75.01 75.03 73.51  75.57 76.62 74.19 73.08
    Standard 79.25 79.25 76.30 76.30  74.31 75.25 75.28 73.56
"""
TABLE7 = """
    teacher 69.81 76.84  31.25 40.16
    none    70.18        33.81
    kd      67.49 73.81  30.45 37.81
    sp      69.56 75.01  31.16 38.28
    crd     71.70 75.80  35.50 40.87
    sskd    74.43 77.45  38.35 42.41
    oh      72.09 76.76  33.52 39.95
"""
RESNETS = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
SIZES = ["wrn40_2 resnet8x4", "resnet32x4 resnet8x4", "resnet32x4 wrn16_2"]
BRANCHES = [["resnet8x2", "resnet8x4", "resnet32x4"]] * 2 + [["wrn16_1", "wrn16_2", "wrn40_2"]]
TABLE9 = """
    teacher 76.22 78.18 78.82  77.89 79.41 80.85  76.53 79.04 80.30
    kd      74.08 75.46 74.84  75.19 76.09 75.19  75.14 76.33 76.37
    sp      74.01 75.58 75.24  75.76 76.37 75.62  75.61 76.91 76.34
    ft      74.55 75.83 76.03  76.54 77.02 76.48  76.26 77.07 76.81
    crd     75.80 76.94 76.52  76.72 76.95 76.54  76.55 77.39 77.27
    sskd    73.67 75.85 75.93  75.77 76.85 76.67  75.27 77.14 77.35
    oh      74.79 75.98 76.09  75.69 76.65 76.38  75.85 76.87 77.00
"""


def standard(model: str, **options) -> Teacher:
    """The teacher trained for accuracy alone."""
    return Teacher("cifar100", model, "vanilla", options)


def sftn(model: str, branch: str, **options) -> Teacher:
    """The teacher with branches of `branch`."""
    return Teacher("cifar100", model, "sftn", {"student": branch, **options})


def distilled(teacher: Teacher | None, student: str, method: str, /, **reported: float | None) -> Row:
    """A student on CIFAR-100 by `method`, as section 4.1 has it."""
    options = slow(student) | ({"kd_weight": 1.0} if method in JOINED else {})
    return Row("cifar100", teacher, student, method, options, figures(**reported))


def pairs(number: int) -> list[Row]:
    """Tables 1 and 2: each student alone, and by each method from each of its two teachers."""
    table, rows = grid(TABLES[number]), []
    tops, alone = table.pop("teacher"), table.pop("none")
    for place, pair in enumerate(PAIRS[number]):
        teacher, student = pair.split()
        rows.append(distilled(None, student, "none", student=alone[place]))
        for column, trained in enumerate((standard(teacher), sftn(teacher, student)), start=2 * place):
            for method, cells in table.items():
                rows.append(distilled(trained, student, method, teacher=tops[column], student=cells[column]))
    return rows


def imagenet() -> list[Row]:
    """Table 3."""
    top1, top5 = grid(TOP1), grid(TOP5)
    teachers = (
        Teacher("imagenet", "resnet50"),
        Teacher("imagenet", "resnet50", "sftn", {"student": "resnet34", "alpha": 1}),
    )
    rows = [Row("imagenet", None, "resnet34", "none", {}, figures(student=73.79, student_top5=91.74))]
    for column, teacher in enumerate(teachers):
        for method in [name for name in top1 if name != "teacher"]:
            options = {"kd_weight": 1.0} if method in JOINED else {}
            reported = figures(
                teacher=top1["teacher"][column],
                teacher_top5=top5["teacher"][column],
                student=top1[method][column],
                student_top5=top5[method][column],
            )
            rows.append(Row("imagenet", teacher, "resnet34", method, options, reported))
    return rows


def others() -> list[Row]:
    """Table 4. RCO's teacher keeps four anchors; EEI-4 and SFTN-4 run the schedule four times, 960 epochs."""
    table, rows = grid(TABLE4), []
    four = {"epochs": 960, "lr_restarts": 4}
    for place, pair in enumerate(OTHERS):
        teacher, student = pair.split()
        plain, friendly, anchored = standard(teacher), sftn(teacher, student), standard(teacher, anchors=4)
        for label, source, method, options in (
            ("none", None, "none", {}),
            ("Standard", plain, "kd", {}),
            ("DML", None, "dml", {"peers": [teacher]}),
            ("KDCL", None, "kdcl", {"peers": [teacher]}),
            ("RCO-one-stage-EEI", anchored, "rco", {"lr_restarts": 1}),
            ("SFTN", friendly, "kd", {}),
            ("RCO-EEI-4", anchored, "rco", four),
            ("SFTN-4", friendly, "kd", four),
        ):
            top = table["teacher"][place] if source and source.method == "vanilla" else None
            reported = figures(teacher=top, student=table[label][place])
            rows.append(Row("cifar100", source, student, method, slow(student) | options, reported, label))
    return rows


def temperatures() -> list[Row]:
    """Table 5, at the KL's weight 1: its row of temperature 1 is Table 6's row of weight 1."""
    return ablation(TABLE5, lambda tau: {"alpha": 1.0} | ({"temperature": float(tau)} if tau != "1" else {}))


def weights() -> list[Row]:
    """Table 6."""
    return ablation(TABLE6, lambda weight: {"alpha": float(weight)} if weight != "3" else {})


def ablation(text: str, options) -> list[Row]:
    """Tables 5 and 6: each line's teachers, then its students by KD."""
    rows = []
    for line, cells in grid(text).items():
        for place, pair in enumerate(ABLATED):
            teacher, student = pair.split()
            source = standard(teacher) if line == "Standard" else sftn(teacher, student, **options(line))
            rows.append(distilled(source, student, "kd", teacher=cells[place], student=cells[len(ABLATED) + place]))
    return rows


def transferred() -> list[Row]:
    """Table 7: rows of Table 2, with the accuracy of a linear classifier on the frozen embeddings of two other sets."""
    table = grid(TABLE7)
    tops, alone = table.pop("teacher"), table.pop("none")
    rows = [distilled(None, "shufflenetv2", "none", stl10=alone[0], tiny_imagenet=alone[1])]
    for column, teacher in enumerate((standard("resnet32x4"), sftn("resnet32x4", "shufflenetv2"))):
        for method, cells in table.items():
            of_teacher = {"teacher_stl10": tops[column], "teacher_tiny_imagenet": tops[2 + column]}
            of_student = {"stl10": cells[column], "tiny_imagenet": cells[2 + column]}
            rows.append(distilled(teacher, "shufflenetv2", method, **of_teacher, **of_student))
    return rows


def similarity() -> list[Row]:
    """Table 8: rows of Table 2, with the KL (nats) and the CKA of teacher and student on the test set."""
    return [
        distilled(teacher, "shufflenetv2", method, kl=cells[column], cka=cells[2 + column])
        for column, teacher in enumerate((standard("resnet32x4"), sftn("resnet32x4", "shufflenetv2")))
        for method, cells in grid(ALIKE).items()
    ]


def branch_sizes() -> list[Row]:
    """Table 9: branches smaller than the student, equal to it, and larger."""
    table = grid(TABLE9)
    tops, rows = table.pop("teacher"), []
    for place, (pair, branches) in enumerate(zip(SIZES, BRANCHES, strict=True)):
        teacher, student = pair.split()
        for column, branch in enumerate(branches, start=3 * place):
            source = sftn(teacher, branch)
            for method, cells in table.items():
                rows.append(distilled(source, student, method, teacher=tops[column], student=cells[column]))
    return rows


def resnets() -> list[Row]:
    """Figure 4: MobileNetV2 by KD from ResNets of several sizes."""
    student = "mobilenetv2"
    teachers = [each for model in RESNETS for each in (standard(model), sftn(model, student))]
    return [distilled(teacher, student, "kd") for teacher in teachers]


def shuffled() -> list[Row]:
    """Figure 5: rows of Table 2."""
    wanted = "resnet32x4", "shufflenetv2", "kd"
    return [row for row in pairs(2) if row.teacher and (row.teacher.model, row.student, row.method) == wanted]


def figures_drawn() -> dict[str, Table]:
    """Figures 3 to 5."""
    return {
        f"sftn/figure{number}": Table(PAPER, f"Figure {number}, CIFAR-100: {title}", found, drawing=drawing)
        for number, drawing, title, found in (
            (3, "best", "the best students of either teacher of Tables 1 and 2", [*pairs(1), *pairs(2)]),
            (4, "teachers", "MobileNetV2 from ResNets of several sizes; which ones is a guess", resnets()),
            (5, "curves", "KL in training, and accuracy, by epoch: resnet32x4 to ShuffleNetV2 by KD", shuffled()),
        )
    }


def tables() -> dict[str, Table]:
    """Tables 1 to 9, and figures."""
    rows = {
        1: ("standard and SFTN teachers, 4 pairs of one family, 12 methods", pairs(1)),
        2: ("the same, 4 pairs of different families", pairs(2)),
        3: ("ResNet-50 to ResNet-34 by 5 methods", imagenet()),
        4: ("collaborative and curriculum learning; SFTN-4 restarts its schedule as RCO-EEI-4 (a guess)", others()),
        5: ("the temperature, here of the KL alone (a guess), at its weight 1", temperatures()),
        6: ("the weight of the branches' KL", weights()),
        7: ("transfer of frozen features to STL10 and Tiny-ImageNet", transferred()),
        8: ("how alike teacher and student are", similarity()),
        9: ("branches smaller and larger than the student", branch_sizes()),
    }
    measures = {8: "KL in nats and linear CKA"}
    return {
        f"sftn/{number}": Table(
            PAPER, f"Table {number}, {'ImageNet' if number == 3 else 'CIFAR-100'}: {title}", found,
            measures.get(number, "top-1 accuracy in percent"),
        )
        for number, (title, found) in rows.items()
    } | figures_drawn()  # fmt: skip
