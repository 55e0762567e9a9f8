"""What the loss kernels cost by their machine code: instructions, registers, spills, width of loads. Needs no GPU.

python -m benchmarks.instructions            writes the table into docs/kernels.md
python -m benchmarks.instructions --print    prints it

The kernels are compiled as their launcher would launch them and disassembled, and their instructions are counted along
the shortest way through (no row is near its teacher), loops as often as they go round. An element is a logit of the
students' or the teacher's. A GPU issues four instructions a clock and multiprocessor, each for 32 elements: over the
elements a second that its memory delivers, and in the backward pass takes gradients for, this is how many instructions
there is time for. It is no measurement: what a GPU makes of it only a run on one shows.
"""

import argparse
import heapq
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton

from benchmarks.launches import Launch, compile_launch, recorded_launches
from common import write_atomically
from kernels import kd_triton

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- instructions -->\n", "<!-- end of instructions -->"
# compute capability, multiprocessors, clock (Hz), memory bandwidth (bytes a second): the makers' data sheets.
CARDS = {
    "V100": (70, 80, 1.53e9, 0.9e12),
    "A100": (80, 108, 1.41e9, 2.0e12),
    "H100": (90, 132, 1.83e9, 3.35e12),
    "H200": (90, 132, 1.83e9, 4.8e12),
}
SHAPES = [(3, 100), (3, 1000), (3, 1271), (1, 32000), (3, 32000)]  # (students K, classes C)
HEAD = [
    "pass",
    "K x C",
    "sm",
    "instructions an element",
    "exponentials",
    "registers",
    "spilled",
    "load, bits",
    "time for",
]
WIDTHS = {"128": 128, "64": 64, "U16": 16}  # bits of a load from global memory; 32 if it says nothing else

Block = tuple[list[str], list[int]]  # instructions, and the addresses of the blocks that may follow


def basic_blocks(listing: str) -> dict[int, Block]:
    """The basic blocks of a disassembled kernel by address.

    BRA.DIV is left out: it leads to what is done when the threads of a warp have parted, which they have not.
    """
    labels, code, names = {}, [], []
    for line in listing.splitlines():
        if found := re.match(r"\s*(\.L_\w+):", line):
            names.append(found[1])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code.append((int(found[1], 16), found[2]))
            labels, names = labels | dict.fromkeys(names, code[-1][0]), []
    blocks, current = {}, None
    for place, (address, instruction) in enumerate(code):
        if current is None or address in labels.values():
            current = blocks[address] = ([], [])
        current[0].append(instruction)
        after = [code[place + 1][0]] if place + 1 < len(code) else []
        # For sm_80 a conditional call without a return stands for a jump, too.
        jump = re.search(r"(\bBRA(?!\.DIV)|^@\S+\s+CALL\.REL\.NOINC).*?(\.L_\w+)", instruction)
        if jump or "EXIT" in instruction:
            current[1].extend((after if instruction.startswith("@") else []) + ([labels[jump[2]]] if jump else []))
            current = None
        elif after and after[0] in labels.values():
            current[1].extend(after)
    return blocks


def shortest_way(blocks: dict[int, Block]) -> list[int]:
    """The addresses of the blocks from the first to an exit with the fewest instructions."""
    queue, done = [(0, [min(blocks)])], set()
    while queue:
        length, way = heapq.heappop(queue)
        instructions, following = blocks[way[-1]]
        if any("EXIT" in each for each in instructions):
            return way
        if way[-1] not in done:
            done.add(way[-1])
            for address in following:
                heapq.heappush(queue, (length + len(instructions), [*way, address]))
    raise ValueError("no way through this code")


def executed(blocks: dict[int, Block], rounds: list[int]) -> list[tuple[str, int]]:
    """The instructions of the shortest way with how often each is executed, `rounds` of loops from the outermost."""
    way, reached, rest = shortest_way(blocks), set(), [min(blocks)]
    while rest:
        if (address := rest.pop()) not in reached:
            reached.add(address)
            rest += blocks[address][1]
    loops = {(head, tail) for tail in reached for head in blocks[tail][1] if head <= tail and head in way}
    found = []
    for address in sorted({*way, *(tail for _, tail in loops)}):  # the jump back may be off the way
        depth = sum(head <= address <= tail for head, tail in loops)
        times = 1
        for each in rounds[:depth]:
            times *= each
        found += [(instruction, times) for instruction in blocks[address][0]]
    return found


def load_width(code: list[tuple[str, int]], logits: float) -> int:
    """Bits of the loads from global memory that bring in at least half of `logits`, in bits a thread.

    32 where no others do: whatever else is loaded, of a row and not of a logit, is float32.
    """
    brought = Counter()
    for instruction, times in code:
        if "LDG" in instruction:
            width = next((WIDTHS[word] for word in re.split(r"[. ]", instruction) if word in WIDTHS), 32)
            brought[width] += width * times
    return next((width for width in WIDTHS.values() if brought[width] >= logits / 2), 32)


def launches(count: int, classes: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of a training step's losses, forward and backward, as with T = 4 and labels."""
    students, teacher = torch.zeros(count, 8, classes, dtype=dtype), torch.zeros(8, classes, dtype=dtype)
    labels, grad = torch.zeros(8, dtype=torch.int64), torch.ones(count)
    options = {"temperature": 4.0, "form": "forward", "label_smoothing": 0.0, "ignore_index": -100, "mean": True}
    with recorded_launches() as found:
        rows = kd_triton.forward(students, teacher, labels, **options)[3]
        kd_triton.backward(
            grad, grad, None, students, teacher, labels, rows, **options, for_students=True, for_teacher=True
        )
    return [found[0], found[2]]


def tool(name: str, *arguments: str) -> str:
    """What a tool of CUDA's, which come with Triton, prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def figures(launch: Launch, arch: int) -> dict[str, float]:
    """Instructions and exponentials an element, registers, spilled bytes, and the width of the 16-bit logits' loads."""
    compiled, arguments = compile_launch(launch, arch), launch[1]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing, usage = tool("nvdisasm", "-c", file.name), tool("cuobjdump", "-res-usage", file.name)
    K, C, block_c = arguments["K"], arguments["C"], arguments["BLOCK_C"]
    tiles = -(-C // block_c)
    sweeps = launch[0].__name__ == "forward_loop"
    code = executed(basic_blocks(listing), [K] * (K > 1) + [tiles] * (sweeps and tiles > 1))
    elements = (K + 1) * arguments["BLOCK_N"] * C / (1 if sweeps else tiles) / (32 * arguments["num_warps"])
    return {
        "instructions": sum(times for _, times in code) / elements,
        "exponentials": sum(times for each, times in code if "MUFU.EX2" in each) / elements,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "bits": load_width(code, 16 * elements),
    }


def budget(card: str, itemsize: int, backward: bool) -> float:
    """Instructions for which a card has time while its memory delivers an element, and takes its gradient."""
    _, multiprocessors, clock, bandwidth = CARDS[card]
    return multiprocessors * 4 * 32 * clock / (bandwidth / (itemsize * (2 if backward else 1)))


def table() -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * 3 + " ---: |" * 5 + " --- |"]
    for K, C in SHAPES:
        for place, name in enumerate(("forward", "backward")):
            for arch in (70, 80, 90):
                half = torch.float16 if arch < 80 else torch.bfloat16
                f = figures(launches(K, C, half)[place], arch)
                cards = [card for card, (its, *_) in CARDS.items() if its == arch]
                times = ", ".join(f"{budget(card, 2, name == 'backward'):.0f} ({card})" for card in cards)
                cells = [name, f"{K} x {C:,}", arch, f"{f['instructions']:.1f}", f"{f['exponentials']:.1f}"]
                cells += [f["registers"], f["spilled"], f["bits"], times]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
                print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="leave docs/kernels.md as it is")
    options = parser.parse_args()
    lines = table()
    if not options.print:
        before, rest = PAGE.read_text().split(BEGIN)
        write_atomically(PAGE, before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
