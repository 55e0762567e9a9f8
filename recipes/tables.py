"""The rows of the papers' tables as recipes: python recipes/tables.py writes them anew.

A recipe is written from a setting and what its row changes. Students do not name their teacher: --teacher does.
"""

from pathlib import Path

import yaml

HERE = Path(__file__).parent
CIFAR100 = {
    "dataset": "cifar100", "epochs": 240, "batch_size": 64, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4,
    "lr_schedule": "multistep", "lr_milestones": [150, 180, 210], "lr_gamma": 0.1,
}  # fmt: skip
# The supplement gives neither batch size nor factor: those of the WideResNet convention (ours).
CIFAR10 = {
    "dataset": "cifar10", "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True,
    "lr_gamma": 0.2,
}  # fmt: skip
IMAGENET = {
    "dataset": "imagenet", "epochs": 100, "batch_size": 256, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4,
    "lr_schedule": "multistep", "lr_milestones": [30, 60, 90], "lr_gamma": 0.1,
}  # fmt: skip
IMAGENET200 = IMAGENET | {"dataset": "imagenet200"}

SFTN = "SFTN (arXiv 2102.07650)"
MSE = "MSE teachers (arXiv 2407.18041)"
ESKD = "On the Efficacy of Knowledge Distillation (ICCV 2019), supplement"
GTN = "GTN (arXiv 2407.16040), supplement"

SFTN_PAIRS = [
    ("wrn40_2", "wrn16_2"), ("wrn40_2", "wrn40_1"), ("resnet32x4", "resnet8x4"), ("resnet32x4", "resnet8x2"),
    ("resnet32x4", "shufflenetv1"), ("resnet32x4", "shufflenetv2"), ("resnet50", "vgg8"), ("wrn40_2", "shufflenetv2"),
]  # fmt: skip
SFTN_BRANCHES = [  # Table 9: teacher, student, the branches' sizes
    ("wrn40_2", "resnet8x4", ("resnet8x2", "resnet8x4", "resnet32x4")),
    ("resnet32x4", "resnet8x4", ("resnet8x2", "resnet8x4", "resnet32x4")),
    ("resnet32x4", "wrn16_2", ("wrn16_1", "wrn16_2", "wrn40_2")),
]
MSE_PAIRS = [
    ("resnet56", "resnet20"), ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("wrn40_2", "wrn16_2"),
    ("wrn40_2", "wrn40_1"), ("vgg13", "vgg8"), ("resnet50", "mobilenetv2"), ("resnet50", "vgg8"),
    ("resnet32x4", "shufflenetv1"), ("resnet32x4", "shufflenetv2"), ("wrn40_2", "shufflenetv1"),
    ("vgg13", "mobilenetv2"),
]  # fmt: skip
SFTN_METHODS = ["kd", "fitnets", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd", "sskd", "oh"]
MSE_METHODS = ["kd", "at", "pkt", "sp", "cc", "rkd", "vid", "crd", "reviewkd", "dkd", "hsakd"]
SLOW = ("shufflenet", "mobilenet")  # students with a learning rate of 0.01

# The supplement's DN40-12 has 0.18 M parameters, DN100-12 0.77 M: these are DenseNet-BC.
FULL, EARLY = "60/200", ("25/80", "20/65", "15/50", "10/35")
ESKD_TEACHERS: dict[str, tuple[str, ...]] = {
    **{f"wrn{depth}_1": (FULL,) for depth in (40, 52, 64, 76, 88)},
    **{f"wrn{depth}_1": (FULL, "15/50", "20/65") for depth in (100, 154, 250)},
    **{f"wrn{depth}_{width}": (FULL,) for depth in (16, 28) for width in (1, 2)},
    **{f"wrn{depth}_{width}": (FULL, *EARLY) for depth in (16, 28) for width in (3, 4, 6, 8)},
    "wrn16_11": (FULL, "20/65"),
    "densenetbc40_12": (FULL,),
    **{f"densenetbc{size}": (FULL, "15/50") for size in ("40_24", "100_12", "40_48", "100_24")},
}
ESKD_STUDENTS = ["wrn16_1", "wrn28_1", "densenetbc40_12"]
ESKD_STOPS = {"resnet18": (), "resnet34": (50,), "resnet50": (35,), "resnet152": (35,)}  # Table 4


def sftn(teacher: str, branch: str, alpha: float = 3.0, temperature: float = 1.0) -> dict:
    own = {"method": "sftn", "model": teacher, "student": branch}
    return own | CIFAR100 | {"alpha": alpha, "temperature": temperature}


def recipes() -> dict[str, tuple[str, dict]]:
    """{path: (what it is, options)}."""
    found: dict[str, tuple[str, dict]] = {}
    for teacher in dict.fromkeys(teacher for teacher, _ in [*SFTN_PAIRS, *MSE_PAIRS]):
        found[f"cifar100/teachers/{teacher}_vanilla"] = (
            f"{SFTN}, Tables 1 and 2, and {MSE}: the standard teacher.",
            {"method": "vanilla", "model": teacher, **CIFAR100},
        )
    for teacher in dict.fromkeys(teacher for teacher, _ in MSE_PAIRS):
        found[f"cifar100/teachers/{teacher}_mse"] = (
            f"{MSE}: the teacher that is trained to be the posterior.",
            {"method": "mse", "model": teacher, **CIFAR100},
        )
    for teacher, branch in SFTN_PAIRS:
        found[f"cifar100/teachers/{teacher}_sftn_{branch}"] = (
            f"{SFTN}, Tables 1 and 2: the teacher for {branch}.",
            sftn(teacher, branch),
        )
    for teacher, student, branches in SFTN_BRANCHES:
        for branch in branches:
            found.setdefault(
                f"cifar100/teachers/{teacher}_sftn_{branch}",
                (
                    f"{SFTN}, Table 9: the teacher for {student}, with branches of {branch}.",
                    {
                        "method": "sftn",
                        "model": teacher,
                        "student": branch,
                        **CIFAR100,
                        "alpha": 3.0,
                        "temperature": 1.0,
                    },
                ),
            )
    for temperature in (5.0, 10.0, 15.0, 20.0):
        found[f"cifar100/teachers/resnet32x4_sftn_shufflenetv2_temperature{temperature:g}"] = (
            f"{SFTN}, Table 5: the softmax temperature of the branches' KL.",
            sftn("resnet32x4", "shufflenetv2", temperature=temperature),
        )
    for alpha in (1.0, 6.0, 10.0):
        found[f"cifar100/teachers/resnet32x4_sftn_shufflenetv2_alpha{alpha:g}"] = (
            f"{SFTN}, Table 6: the weight of the branches' KL.",
            sftn("resnet32x4", "shufflenetv2", alpha=alpha),
        )
    for student in dict.fromkeys(student for _, student in [*SFTN_PAIRS, *MSE_PAIRS]):
        slow = {"lr": 0.01} if student.startswith(SLOW) else {}
        for method in ["none", *dict.fromkeys([*SFTN_METHODS, *MSE_METHODS])]:
            found[f"cifar100/students/{student}_{method}"] = (
                f"{MSE}, and {SFTN}: the student by {method}.",
                {"method": method, "student": student, **CIFAR100, **slow},
            )
    for student in dict.fromkeys(student for _, student in SFTN_PAIRS):
        slow = {"lr": 0.01} if student.startswith(SLOW) else {}
        for method in SFTN_METHODS[1:]:
            if method != "sskd":  # which has plain KD within it
                found[f"cifar100/students/{student}_{method}_kd"] = (
                    f"{SFTN}, Tables 1 and 2: the student by {method} together with plain KD.",
                    {"method": method, "student": student, "kd_weight": 1.0, **CIFAR100, **slow},
                )
    for method in ("dkd", "sckd"):
        found[f"cifar100/students/pool_{method}"] = (
            f"{GTN}, section 3: students of the pool (--student pool:SEED) by {method}.",
            {"method": method, "student": "pool:0", **CIFAR100, "lr_schedule": "cosine"},
        )
    for teacher in ("wrn40_2", "resnet32x4", "resnet50"):
        found[f"cifar100/teachers/{teacher}_anchors4"] = (
            f"{SFTN}, Table 4: a standard teacher whose four anchors RCO walks along.",
            {"method": "vanilla", "model": teacher, "anchors": 4, **CIFAR100},
        )
    for restarts, epochs in ((1, 240), (4, 960)):
        found[f"cifar100/students/wrn16_2_rco{restarts}"] = (
            f"{SFTN}, Table 4: RCO with equal epoch intervals, {epochs} epochs.",
            {"method": "rco", "student": "wrn16_2", **CIFAR100, "epochs": epochs, "lr_restarts": restarts},
        )
    for method in ("dml", "kdcl"):
        found[f"cifar100/students/wrn16_2_{method}"] = (
            f"{SFTN}, Table 4: collaborative learning with the teacher's architecture.",
            {"method": method, "student": "wrn16_2", "peers": ["wrn40_2"], **CIFAR100},
        )
    for teacher, modes in ESKD_TEACHERS.items():
        for mode in modes:
            found[f"cifar10/teachers/{teacher}_{mode.replace('/', '_')}"] = (
                f"{ESKD}, Tables 1 to 10: {teacher} by the schedule {mode}.",
                {"method": "vanilla", "model": teacher, "schedule": mode, **CIFAR10},
            )
    for student in ESKD_STUDENTS:
        for method in ("none", "kd", "at+kd"):
            found[f"cifar10/students/{student}_{method.replace('+', '_')}"] = (
                f"{ESKD}, Tables 1 to 10: the student by {method}, schedule 60/200.",
                {"method": method, "student": student, **CIFAR10, "epochs": 200, "lr_schedule": "multistep",
                 "lr_milestones": [60, 120, 180]},
            )  # fmt: skip
    for teacher, stops in ESKD_STOPS.items():
        for stop in (None, *stops):
            found[f"imagenet/teachers/{teacher}" + (f"_stop{stop}" if stop else "")] = (
                f"{ESKD}, Table 4: {teacher}" + (f" stopped after {stop} of 100 epochs." if stop else "."),
                {"method": "vanilla", "model": teacher, **IMAGENET} | ({"stop_after": stop} if stop else {}),
            )
    found["imagenet/teachers/resnet50_sftn_resnet34"] = (
        f"{SFTN}, Table 3: ResNet-50 for ResNet-34.",
        {"method": "sftn", "model": "resnet50", "student": "resnet34", **IMAGENET, "alpha": 1.0, "temperature": 1.0},
    )
    for method in ("none", "kd", "fitnets", "sp", "crd", "oh"):
        found[f"imagenet/students/resnet34_{method}"] = (
            f"{SFTN}, Table 3: ResNet-34 by {method}.",
            {"method": method, "student": "resnet34", **IMAGENET},
        )
    efficient = {"model": "efficientnet_b0", **IMAGENET200, "lr": 0.05}
    found["imagenet200/teachers/efficientnet_b0_adapt"] = (
        f"{GTN}, section 2: EfficientNet-B0 from ImageNet's weights, adapted before anything else.",
        {"method": "vanilla", "pretrained": True, **efficient, "epochs": 15},
    )
    found["imagenet200/teachers/efficientnet_b0_vanilla"] = (
        f"{GTN}, section 2: 35 more epochs; --weights is the adapted model's model.safetensors.",
        {"method": "vanilla", **efficient, "epochs": 35, "lr_schedule": "constant"},
    )
    found["imagenet200/teachers/efficientnet_b0_gtn"] = (
        f"{GTN}, section 2: the generic teacher; --weights is the adapted model's model.safetensors.",
        {"method": "gtn", **efficient, "epochs": 240, "lr_milestones": [60, 90, 120], "alpha": 1.0,
         "freeze_teacher_epochs": 60},
    )  # fmt: skip
    found["imagenet200/students/pool_kd"] = (
        f"{GTN}, section 3: students of the pool (--student pool:SEED).",
        {"method": "kd", "student": "pool:0", **IMAGENET200, "epochs": 240, "lr_schedule": "cosine"},
    )
    return found


def as_text(comment: str, options: dict) -> str:
    falls = options.get("lr_schedule") == "multistep" or "schedule" in options
    unused = () if falls else ("lr_milestones", "lr_gamma")
    rows = [{name: value} for name, value in options.items() if name not in unused]
    styles = [None if isinstance(value, list) else False for row in rows for value in row.values()]
    lines = [yaml.safe_dump(row, default_flow_style=style) for row, style in zip(rows, styles, strict=True)]
    return f"# {comment}\n{''.join(lines)}"


if __name__ == "__main__":
    for path, (comment, options) in recipes().items():
        file = HERE / f"{path}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(as_text(comment, options))
    print(f"{len(recipes())} recipes written under {HERE}")
