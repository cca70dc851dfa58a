"""Does the certificate keep its promise? Calibration sets drawn many times from a population with known risks.

The hardest case for validity: alpha lies just below the true risk of one model in the middle of the path, so that every
certificate for it is a violation, and as likely as it can be. Every draw goes through `certify.path.certify`.

Then end to end: `pxcompress run --max-drop`, and the risk of the chosen model on fresh images. From the
repository's root; it trains the dense models when they are not in the cache.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
from certify_methods import BOUNDS, TESTING, max_errors
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import norm

from pxcompress.certify.learn_then_test import fixed_sequence
from pxcompress.certify.path import RISKS, Candidate, RiskLimit, by_class, certify, losses
from pxcompress.choices import LOSS_RISKS
from pxcompress.data.batches import ImageBatches, read_images
from pxcompress.data.samples import Samples
from pxcompress.demo.glyphs import glyph_arrays
from pxcompress.deploy.runtime import open_session
from pxcompress.pipeline import compress
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.run_folder.certificate import ReservedSamples, judge_files
from pxcompress.run_folder.names import DENSE, SLIM
from pxcompress.run_folder.saved import preprocessing_of
from pxcompress.types import Preprocessing

Array = NDArray[Any]
SEED = 0
CLASSES = 10
DELTAS = (0.05, 0.1)
SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
CHANGED = (0.0, 0.002, 0.005, 0.01, 0.016, 0.022, 0.032, 0.05, 0.08, 0.15)
EDGE = 6  # index of the first model that is too bad
PARTS = ("all", "confident part", "every class")
RUNS = tuple(
    (kind, model, "glyphs", alpha)
    for kind, model in (("ResNet", "resnet10t"), ("ViT", "benchmarks.models:vit_hybrid"))
    for alpha in (0.01, 0.03, 0.05)
)
QUICK_RUN = ("ResNet", "resnet10t", "glyphs:train=3200,select=200,held_out=1000", 0.05)
RATIO = 0.7
FRESH_SEED = 1


@dataclass(frozen=True)
class Population:
    """Predicted classes: dense and labels (n,), pruned (models, n); whether the dense model is confident (n,)."""

    dense: Array
    labels: Array
    pruned: Array
    confident: Array


@dataclass(frozen=True)
class Case:
    """One risk on one part of the population: `table` (n, models) of losses, those of `counted` samples count."""

    risk: str
    part: str
    table: Array
    labels: Array
    counted: Array
    alpha: float
    true_risk: Array


def population(rng: np.random.Generator, n: int) -> Population:
    """Smaller models change more answers, mostly the same ones as larger models do; class 0 suffers most."""
    labels = rng.integers(CLASSES, size=n)
    dense = np.where(rng.random(n) < 0.92, labels, (labels + rng.integers(1, CLASSES, size=n)) % CLASSES)
    shared = rng.standard_normal(n) - 0.3 * (labels == 0)
    pruned = []
    for rate in CHANGED:
        ease = math.sqrt(0.8) * shared + math.sqrt(0.2) * rng.standard_normal(n)
        other = (dense + rng.integers(1, CLASSES, size=n)) % CLASSES
        other = np.where((dense != labels) & (rng.random(n) < 0.3), labels, other)
        pruned.append(np.where(ease < norm.ppf(rate), other, dense))
    return Population(dense, labels, np.stack(pruned), shared + 2 * rng.standard_normal(n) > -1.5)


def case(people: Population, risk: str, part: str) -> Case:
    """Losses and true risks; alpha is just below the true risk of model `EDGE`."""
    columns = [losses(risk, people.dense, pruned, people.labels) for pruned in people.pruned]
    table = np.stack(columns, axis=1)
    counted = people.confident if part == "confident part" else np.ones(len(table), dtype=bool)
    if part == "every class":
        true_risk = np.max([table[people.labels == index].mean(axis=0) for index in range(CLASSES)], axis=0)
    else:
        true_risk = table[counted].mean(axis=0)
    return Case(risk, part, table, people.labels, counted, float(true_risk[EDGE]) - 1e-9, true_risk)


def candidates(table: Array) -> list[Candidate]:
    return [Candidate(f"size {size}", size, table[:, index]) for index, size in enumerate(SIZES)]


def draw(this: Case, rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Losses (counted, models) and labels of one calibration set, independent samples of the population."""
    index = rng.integers(len(this.table), size=n)
    index = index[this.counted[index]]
    return this.table[index].astype(np.float64), this.labels[index]


def choices(this: Case, table: Array, labels: Array) -> dict[tuple[str, float], int]:
    """(method, delta) -> how many models of the path pass; the naive rule knows no delta."""
    limit = RiskLimit(this.risk, this.alpha)
    low, width = RISKS[this.risk].low, RISKS[this.risk].high - RISKS[this.risk].low
    masks = by_class(labels, [str(index) for index in range(CLASSES)]) if this.part == "every class" else None
    certificate = certify(candidates(table), limit, masks)
    certified = {(limit.bound, delta): sum(certificate.at(delta).certified) for delta in DELTAS}
    if masks:
        means = np.max([table[mask].mean(axis=0) for mask in masks.values()], axis=0)
        stricter = [min(1.0, len(masks) * row.p_value) for row in certificate.rows]
        certified |= {("binomial, Bonferroni over classes", delta): fixed_sequence(stricter, delta) for delta in DELTAS}
    else:
        means = table.mean(axis=0)
        for name, bound in BOUNDS.items():
            p_values = bound(((table - low) / width).T, (this.alpha - low) / width)
            certified |= {(name, delta): fixed_sequence(p_values, delta) for delta in DELTAS}
    # The naive rule takes the smallest model whose measured risk is fine.
    passing = np.flatnonzero(means <= this.alpha)
    return certified | {("naive", delta): int(passing[-1]) + 1 if len(passing) else 0 for delta in DELTAS}


def simulate(this: Case, rng: np.random.Generator, n: int, draws: int) -> list[dict[str, Any]]:
    """One row a method and delta. Without a certified model the dense one ships: size 1.

    In the mean, sizes below the oracle's count as the oracle's: a violation earns nothing.
    """
    passed: dict[tuple[str, float], list[int]] = {}
    for _ in range(draws):
        for key, count in choices(this, *draw(this, rng, n)).items():
            passed.setdefault(key, []).append(count)
    oracle = SIZES[int(np.flatnonzero(this.true_risk <= this.alpha)[-1])]
    rows = []
    for (method, delta), counts in passed.items():
        chosen = [SIZES[count - 1] if count else 1.0 for count in counts]
        wrong = [count > 0 and this.true_risk[count - 1] > this.alpha for count in counts]
        row = {"risk": this.risk, "part": this.part, "method": method, "delta": delta, "alpha": this.alpha, "n": n}
        row |= {
            "draws": draws,
            "violation_rate": float(np.mean(wrong)),
            "mean_size": float(np.maximum(chosen, oracle).mean()),
        }
        rows.append(
            row | {"oracle_size": oracle, "not_certified_rate": float(np.mean([not count for count in counts]))}
        )
    return rows


def simulate_paths(people: Population, rng: np.random.Generator, n: int, draws: int) -> list[dict[str, Any]]:
    """Three paths for one risk (negative flips): every other model, the rest, and a short one that can pass whole."""
    this = case(people, "negative-flips", "all")
    paths = {"first": range(0, len(SIZES), 2), "second": range(1, len(SIZES), 2), "short": range(4)}
    models = [index for indices in paths.values() for index in indices]
    ends = list(itertools.accumulate(map(len, paths.values())))
    chains = [range(end - len(indices), end) for end, indices in zip(ends, paths.values(), strict=True)]
    limit = RiskLimit(alpha=this.alpha)
    chosen: dict[tuple[str, float], list[tuple[bool, float]]] = {}
    for _ in range(draws):
        table, _ = draw(this, rng, n)
        p_values = np.array([limit.p_value(table[:, index]) for index in models])
        for name, delta in itertools.product(TESTING, DELTAS):
            passed = [models[place] for place in np.flatnonzero(TESTING[name](chains, p_values, delta))]
            index = max(passed, default=0)
            result = (bool(this.true_risk[index] > this.alpha), max(SIZES[index], SIZES[EDGE - 1]))
            chosen.setdefault((name, delta), []).append(result)
    rows = []
    for (testing, delta), results in chosen.items():
        violations, sizes = np.mean(results, axis=0).tolist()
        row = {"risk": this.risk, "part": "three paths", "method": testing, "delta": delta, "alpha": this.alpha, "n": n}
        rows.append(
            row | {"draws": draws, "violation_rate": violations, "mean_size": sizes, "oracle_size": SIZES[EDGE - 1]}
        )
    return rows


def end_to_end(kind: str, model: str, data: str, alpha: float, fresh: int) -> dict[str, Any]:
    """One certified run, and the risk of what it chose on images that it has not seen."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        recipe = Recipe(
            model, RATIO, budget="channels", data=data, repair=("closed-form",), guarantee=Guarantee(alpha, steps=7)
        )
        report = compress(recipe, folder, note=print)
        record = report.certificate
        assert record is not None
        files = [(name, size, folder / name) for name, size in ((DENSE, 1.0), (SLIM, 0.0))]
        samples = fresh_samples(data, preprocessing_of(open_session(folder / DENSE, "cpu").metadata, folder), fresh)
        again = judge_files(files, samples, RiskLimit(record.risk, alpha)).rows[1]
    row = {"risk": record.risk, "part": f"end to end, {kind} on {data}", "model": model, "alpha": alpha}
    path = [asdict(each) for each in record.rows]
    row |= {"delta": record.delta, "n": record.n, "chosen": record.chosen_name, "path": path}
    row |= {"fresh_n": again.n, "fresh_risk": again.errors / again.n}
    row |= {"top1_dense": report.dense.quality.value, "top1_certified": report.pruned.quality.value}
    return row | {"macs_ratio": report.ratios.macs, "params_ratio": report.ratios.params}


def fresh_samples(data: str, preprocessing: Preprocessing, count: int) -> ReservedSamples:
    """`count` glyphs drawn with another seed."""
    images, labels = glyph_arrays("held-out", count, FRESH_SEED)
    names = [f"fresh/{index}" for index in range(count)]
    samples = Samples.of(names, labels, lambda index: Image.fromarray(images[index]))
    batches = ImageBatches(read_images(samples, preprocessing, False).store, 256)
    return ReservedSamples(data, batches, samples.ids, select=(), counts={})


def claims_end_to_end(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for row in rows:
        where = f"{row['part']}, alpha {row['alpha']:g}"
        text = f"{where}: risk on {row['fresh_n']} fresh images of {row['chosen']!r} (target: alpha)"
        made.append(common.claim(text, row["fresh_risk"], row["alpha"], "lower"))
        text = f"{where}: the smallest certified model has fewer MACs than the dense one (ratio)"
        made.append(common.claim(text, row["macs_ratio"], 0.99, "lower"))
    return made


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Validity of every case, power against the other bounds, the naive rule, the reference numbers."""
    made = [reference(alpha, target) for alpha, target in ((0.03, 129), (0.05, 224))]
    own = {RISKS[risk].bound for risk in RISKS} | set(TESTING)
    by_key = {(row["risk"], row["part"], row["delta"], row["method"]): row for row in rows}
    for (risk, part, delta, method), row in by_key.items():
        where = f"{risk}, {part}, delta {delta:g}"
        slack = 2 * math.sqrt(delta * (1 - delta) / row["draws"])
        if method in own:
            text = f"{where}: violation rate of {method} (target: delta + 2 Monte-Carlo standard errors)"
            made.append(common.claim(text, row["violation_rate"], delta + slack, "lower"))
        if method == "naive":
            text = f"{where}: violation rate of the naive rule is above delta"
            made.append(common.claim(text, row["violation_rate"], delta + slack, "higher"))
        for other in ("hoeffding-bentkus", "hoeffding", "bonferroni") if method in own else ():
            if (compared := by_key.get((risk, part, delta, other))) and other != method:
                text = f"{where}: mean size certified by {method}, oracle {row['oracle_size']} (target: {other})"
                made.append(common.claim(text, row["mean_size"], compared["mean_size"], "lower"))
    return made


def reference(alpha: float, target: int) -> dict[str, Any]:
    errors = max_errors(5000, alpha, 0.05)
    return common.claim(
        f"errors that pass: n 5000, delta 0.05, alpha {alpha}", math.nan if errors is None else errors, target, "equal"
    )


def main() -> None:
    quick = common.parser(__doc__ or "").parse_args().quick
    draws, n = (200, 1000) if quick else (2000, 2000)
    rng = np.random.default_rng(SEED)
    people = population(rng, 200_000)
    cases = [(risk, "all") for risk in RISKS if risk not in LOSS_RISKS] + [
        ("negative-flips", part) for part in PARTS[1:]
    ]
    rows = []
    for risk, part in cases:
        # A tenth of the samples for each class: more of them, or nothing is certified.
        rows += simulate(case(people, risk, part), rng, 5 * n if part == "every class" else n, draws)
    rows += simulate_paths(people, rng, n, draws)
    runs = [end_to_end(*run, 2000 if quick else 10_000) for run in ((QUICK_RUN,) if quick else RUNS)]
    command = "python benchmarks/certify.py" + " --quick" * quick
    common.write("certify", command, [*rows, *runs], [SEED, FRESH_SEED], [*claims(rows), *claims_end_to_end(runs)])


if __name__ == "__main__":
    main()
