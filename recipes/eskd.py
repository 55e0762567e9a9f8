"""The tables of "On the Efficacy of Knowledge Distillation" (Cho and Hariharan, ICCV 2019), supplement.

Teachers by STEP/TOTAL: the learning rate falls every STEP epochs and training stops at TOTAL; 60/200 is the full
schedule, the students' too. By the parameter counts given there its DenseNets are DenseNet-BC (DN40-12 has 0.18M).
AT+KD: 0.1 of cross-entropy, 0.9 of KD, and AT. Figures are errors in percent, of students with their deviations.
Of Figure 1 the caption alone is at hand: ImageNet's students, whom distillation harms, and it or the teacher stopped.
"""

from collections.abc import Iterator

from recipes.rows import Row, Table, Teacher, figures, grid

PAPER = "Efficacy of KD (ICCV 2019)"
FULL = "60/200"
ALONE = {"wrn16_1": (8.751, 0.129), "wrn28_1": (7.101, None), "densenetbc40_12": (7.268, 0.148)}

# Teacher (and its schedule, where it is not the full one): its error, then the student's and its deviation.
TABLE1 = """
    densenetbc40_24        5.419  8.350 0.195
    densenetbc100_12       4.974  8.297 0.069
    densenetbc40_48        4.667  8.370 0.212
    densenetbc100_24       4.272  8.763 0.178
    densenetbc40_24:15/50  6.823  8.045 0.092
    densenetbc100_12:15/50 6.615  7.915 0.120
    densenetbc40_48:15/50  5.666  7.854 0.127
    densenetbc100_24:15/50 5.435  8.016 0.223
"""
TABLE2 = """
    densenetbc40_12        7.169  6.821 0.226
    densenetbc40_24        5.419  6.964 0.139
    densenetbc100_12       4.974  6.847 0.278
    densenetbc40_48        4.667  7.266 0.359
    densenetbc100_24       4.272  7.507 0.204
    densenetbc40_24:15/50  6.823  6.981 0.112
    densenetbc100_12:15/50 6.615  6.645 0.089
    densenetbc40_48:15/50  5.666  6.679 0.123
    densenetbc100_24:15/50 5.435  6.721 0.298
"""
TABLE3 = """
    wrn16_8        -  7.945 0.127
    wrn16_8:20/65  -  7.781 0.201
    wrn100_1       -  8.524 0.182
    wrn100_1:20/65 -  8.191 0.104
"""
TABLE4 = """
    resnet18     30.24 10.92
    resnet34     26.70  8.58
    resnet34:50  27.72  9.10
    resnet50     23.85  7.13
    resnet50:35  27.01  8.75
    resnet152    21.69  6.03
    resnet152:35 23.58  7.03
"""
TABLE5 = """
    wrn40_1        6.517  8.324 0.111
    wrn52_1        6.042  8.481 0.198
    wrn64_1        6.032  8.573 0.158
    wrn76_1        5.864  8.666 0.121
    wrn88_1        5.686  8.811 0.153
    wrn100_1       5.568  8.484 0.182
    wrn154_1       5.478  8.546 0.181
    wrn250_1       5.271  8.787 0.173
    wrn100_1:15/50 7.526  8.192 0.198
    wrn154_1:15/50 7.318  8.227 0.212
    wrn250_1:15/50 6.893  8.263 0.234
"""
TABLE6 = """
    wrn40_1        6.517  7.389 0.244
    wrn52_1        6.042  7.640 0.204
    wrn64_1        6.032  7.600 0.247
    wrn76_1        5.864  7.407 0.137
    wrn88_1        5.686  7.642 0.131
    wrn100_1       5.568  7.693 0.134
    wrn154_1       5.478  7.780 0.299
    wrn250_1       5.271  7.711 0.152
    wrn100_1:15/50 7.526  7.025 0.182
    wrn154_1:15/50 7.318  7.169 0.161
    wrn250_1:15/50 6.893  7.488 0.291
"""
TABLE7 = """
    wrn16_1       8.751  8.182 0.250
    wrn16_2       6.269  7.610 0.222
    wrn16_3       5.340  7.681 0.259
    wrn16_3:25/80 6.289  7.517 0.212
    wrn16_3:20/65 6.507  7.498 0.201
    wrn16_3:15/50 6.734  7.788 0.112
    wrn16_3:10/35 7.416  8.093 0.119
    wrn16_4       4.964  7.733 0.186
    wrn16_4:25/80 5.666  7.658 0.062
    wrn16_4:20/65 5.963  7.612 0.112
    wrn16_4:15/50 6.358  7.788 0.112
    wrn16_4:10/35 7.130  8.093 0.119
    wrn16_6       4.529  7.929 0.071
    wrn16_6:25/80 5.261  7.687 0.157
    wrn16_6:20/65 5.498  7.594 0.173
    wrn16_6:15/50 5.893  7.685 0.163
    wrn16_6:10/35 6.635  7.751 0.157
    wrn16_8       4.410  8.028 0.136
    wrn16_8:25/80 4.984  7.642 0.163
    wrn16_8:20/65 5.270  7.482 0.041
    wrn16_8:15/50 5.498  7.596 0.089
    wrn16_8:10/35 6.240  7.784 0.223
"""
TABLE8 = """
    wrn28_1       7.101  7.101 0.072
    wrn28_2       5.201  6.973 0.130
    wrn28_3       4.687  6.952 0.138
    wrn28_3:25/80 5.369  6.702 0.159
    wrn28_3:20/65 5.696  6.621 0.066
    wrn28_3:15/50 6.180  6.544 0.262
    wrn28_3:10/35 6.962  6.807 0.076
    wrn28_4       4.509  7.118 0.198
    wrn28_4:25/80 4.994  6.768 0.099
    wrn28_4:20/65 5.201  6.772 0.060
    wrn28_4:15/50 5.824  6.610 0.330
    wrn28_4:10/35 6.526  6.718 0.063
    wrn28_6       4.104  7.070 0.159
    wrn28_6:25/80 4.608  6.869 0.152
    wrn28_6:20/65 4.865  6.920 0.114
    wrn28_6:15/50 5.330  6.720 0.060
    wrn28_6:10/35 5.992  6.710 0.241
    wrn28_8       4.064  7.227 0.149
    wrn28_8:25/80 4.578  6.819 0.155
    wrn28_8:20/65 4.657  6.817 0.117
    wrn28_8:15/50 5.092  6.748 0.118
    wrn28_8:10/35 6.022  6.795 0.123
"""
# As above, student by student and method by method.
TABLE9 = {
    ("wrn16_1", "kd"): """
        wrn16_1 8.751  8.182 0.250
        wrn16_2 6.269  7.610 0.222
        wrn16_3 5.340  7.681 0.259
        wrn16_4 4.964  7.733 0.186
        wrn16_6 4.529  7.929 0.071
        wrn16_8 4.410  8.028 0.136
    """,
    ("wrn16_1", "at+kd"): """
        wrn16_2       6.269  7.498 0.062
        wrn16_3       5.340  7.551 0.130
        wrn16_4       4.964  7.656 0.131
        wrn16_6       4.529  7.668 0.139
        wrn16_8       4.410  7.794 0.203
        wrn16_3:20/65 6.507  -     -
        wrn16_4:20/65 5.963  7.585 0.165
        wrn16_6:20/65 5.498  7.484 0.223
        wrn16_8:20/65 5.270  7.494 0.165
    """,
    ("wrn28_1", "kd"): """
        wrn28_1 7.101  7.101 0.072
        wrn28_2 5.201  6.973 0.130
        wrn28_3 4.687  6.952 0.138
        wrn28_4 4.509  7.118 0.198
        wrn28_6 4.104  7.070 0.159
        wrn28_8 4.064  7.227 0.149
    """,
    ("wrn28_1", "at+kd"): """
        wrn28_2       5.201  6.538 0.185
        wrn28_3       4.687  6.526 0.121
        wrn28_4       4.509  6.657 0.118
        wrn28_6       4.104  6.443 0.092
        wrn28_8       4.064  6.487 0.222
        wrn28_3:15/50 6.180  6.410 0.162
        wrn28_4:15/50 5.824  6.429 0.090
        wrn28_6:15/50 5.330  6.358 0.168
        wrn28_8:15/50 5.092  6.402 0.107
    """,
}
TABLE10 = {
    ("wrn28_1", "kd"): """
        wrn16_4        4.964  6.518 0.204
        wrn16_4:20/65  5.963  6.483 0.173
        wrn16_6        4.529  6.613 0.227
        wrn16_6:20/65  5.498  6.230 0.069
        wrn16_11       4.193  6.774 0.111
        wrn16_11:20/65 5.033  6.281 0.184
    """,
    ("wrn28_1", "at+kd"): """
        wrn16_4        4.964  6.357 0.086
        wrn16_4:20/65  5.963  6.253 0.177
        wrn16_6        4.529  6.253 0.278
        wrn16_6:20/65  5.498  6.133 0.113
        wrn16_11       4.193  6.360 0.109
        wrn16_11:20/65 5.033  6.202 0.172
    """,
}


def teacher(name: str) -> Teacher:
    """MODEL or MODEL:STEP/TOTAL."""
    model, _, schedule = name.partition(":")
    return Teacher("cifar10", model, "vanilla", {"schedule": schedule} if schedule else {})


def students(student: str, text: str, method: str = "kd", **options) -> Iterator[Row]:
    """One student by one method from the teachers of a printed table."""
    if method == "at+kd":
        options |= {"ce_weight": 0.1, "kd_weight": 0.9}
    for name, (above, error, deviation) in grid(text).items():
        reported = figures(teacher=above, student=error, student_std=deviation)
        yield Row("cifar10", teacher(name), student, method, options, reported, f"{name.partition(':')[2] or FULL}")


def alone(student: str) -> Row:
    """The student by the labels alone."""
    error, deviation = ALONE[student]
    return Row("cifar10", None, student, "none", {}, figures(student=error, student_std=deviation), FULL)


def imagenet() -> Iterator[Row]:
    """Table 4: teachers, early-stopped ones by the same schedule, cut off."""
    for name, (top1, top5) in grid(TABLE4).items():
        model, _, stop = name.partition(":")
        source = Teacher("imagenet", model, "vanilla", {"stop_after": int(stop)} if stop else {})
        yield Row("imagenet", source, figures=figures(teacher=top1, teacher_top5=top5))


def harming() -> list[Row]:
    """Figure 1: ResNet-18 alone, and from either ResNet-34 of Table 4 to the end and for half of the epochs."""
    table, student = grid(TABLE4), "resnet18"
    rows = [Row("imagenet", None, student, "none", {}, figures(student=table[student][0]))]
    for row in imagenet():
        if row.teacher.model == "resnet34":
            for label, options in (("kd", {}), ("kd for half of the epochs", {"stop_kd_epoch": 50})):
                rows.append(Row("imagenet", row.teacher, student, "kd", options, row.figures, label))
    return rows


def tables() -> dict[str, Table]:
    """Tables 1 to 10, and Figure 1."""
    rows = {
        1: ("WRN16-1 from DenseNets", [alone("wrn16_1"), *students("wrn16_1", TABLE1)]),
        2: ("DN40-12 from DenseNets", [alone("densenetbc40_12"), *students("densenetbc40_12", TABLE2)]),
        3: ("WRN16-1 by the cosine schedule", [*students("wrn16_1", TABLE3, lr_schedule="cosine")]),
        4: ("teachers, stopped early or not", [*imagenet()]),
        5: ("WRN16-1 from ever deeper WRNs", [alone("wrn16_1"), *students("wrn16_1", TABLE5)]),
        6: ("DN40-12 from ever deeper WRNs", [alone("densenetbc40_12"), *students("densenetbc40_12", TABLE6)]),
        7: ("WRN16-1 from ever wider WRN16s, by schedule", [*students("wrn16_1", TABLE7)]),
        8: ("WRN28-1 from ever wider WRN28s, by schedule", [*students("wrn28_1", TABLE8)]),
        9: ("KD and AT+KD from ever wider WRNs", _by_method(TABLE9)),
        10: ("WRN28-1 from WRN16s by KD and AT+KD", _by_method(TABLE10)),
    }
    measure, title = "top-1 error in percent", "ImageNet: ResNet-18 by epoch, by KD to the end or stopped (a guess)"
    found = {
        f"eskd/{number}": Table(
            PAPER, f"Table {number}, {'ImageNet' if number == 4 else 'CIFAR-10'}: {title}", found, measure
        )
        for number, (title, found) in rows.items()
    }
    return found | {"eskd/figure1": Table(PAPER, f"Figure 1, {title}", harming(), measure, "curves")}


def _by_method(parts: dict[tuple[str, str], str]) -> list[Row]:
    names = dict.fromkeys(student for student, _ in parts)
    rows = [alone(student) for student in names]
    return rows + [row for (student, method), text in parts.items() for row in students(student, text, method)]
