"""Certificates that cost few labels, hold for bounded losses and survive reuse: do they keep their promise?

Calibration sets are drawn many times from populations with known risks, where alpha lies just below the true risk of
one model, so that every certificate for it is a violation. Then how many labels a path of our own nets takes. From the
repository's root; the last part trains a dense model when it is not in the cache.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np
from certify import CHANGED, EDGE, SIZES, Population, population
from certify_methods import hoeffding, hoeffding_bentkus

from pxcompress.cache import cache_dir
from pxcompress.certify.anytime import certify_anytime, stake_budget, stopping_time
from pxcompress.certify.bounded import mean_interval
from pxcompress.certify.few_labels import completed_labels, samples_to_label
from pxcompress.certify.learn_then_test import Array, betting, binomial, e_process, fixed_sequence, log_wealth
from pxcompress.certify.path import Candidate, CertificateRow, RiskLimit, losses
from pxcompress.choices import LOSS_RISKS
from pxcompress.data import open_source
from pxcompress.pipeline import compress
from pxcompress.recipe import Guarantee, Recipe
from pxcompress.run_folder.certificate import ReservedSamples, judge_files
from pxcompress.run_folder.labelling import QUESTIONS, certify_answers, request_labels
from pxcompress.run_folder.ledger import Procedure
from pxcompress.run_folder.names import DENSE, SLIM
from pxcompress.run_folder.verification import verify
from pxcompress.workload import load_workload

SEED = 0
DELTA = 0.05
PATHS = {"path with bad models": len(SIZES), "path of four good models": 4}
REUSED = (*[0.03] * 6, *[0.005] * 3, *[0.08] * 3)
"""Risks of the models that are tested one after the other, at alpha = 0.03."""
RATIOS = (0.5, 0.8, 0.9)
TASK_RUNS = (
    ("segmenter", "pxcompress.demo.nets:unet", "glyph-masks", 0.05),
    ("detector", "pxcompress.demo.detectors:glyph_yolo", "glyph-boxes", 0.1),
)
Row = dict[str, Any]


def slack(draws: int, delta: float = DELTA) -> float:
    """delta and two Monte-Carlo standard errors."""
    return delta + 2 * math.sqrt(delta * (1 - delta) / draws)


def few_labels(people: Population, rng: np.random.Generator, n: int, draws: int) -> Iterator[Row]:
    """Labels of all samples, of the disagreeing ones, and of those that an anytime test asks for."""
    for risk, path in itertools.product(("negative-flips", "accuracy-drop"), PATHS):
        true = np.array([losses(risk, people.dense, pruned, people.labels).mean() for pruned in people.pruned])
        limit = RiskLimit(risk, float(true[EDGE]) - 1e-9, DELTA)
        some = replace(people, pruned=people.pruned[: PATHS[path]])
        drawn = [_few_labels(some, rng.integers(len(people.labels), size=n), limit) for _ in range(draws)]
        for method in ("all labels", "where models disagree", "anytime, where they disagree", "all, hoeffding-bentkus"):
            results = [each[method] for each in drawn]
            row: Row = {"part": f"few labels, {path}", "risk": risk, "method": method, "delta": DELTA}
            row |= {"alpha": limit.alpha, "n": n, "draws": draws}
            row |= {"violation_rate": float(np.mean([passed > EDGE for passed, _, _ in results]))}
            row |= {"mean_labels": float(np.mean([labels for _, labels, _ in results]))}
            row |= {"mean_models_passed": float(np.mean([passed for passed, _, _ in results]))}
            yield row | {"largest_p_difference": max(gap for _, _, gap in results)}


def _few_labels(people: Population, index: Array, limit: RiskLimit) -> dict[str, tuple[int, int, float]]:
    """By method: models that pass, labels that were needed, largest difference of a p-value to that of all labels."""
    dense, labels, pruned = people.dense[index], people.labels[index], people.pruned[:, index]
    predicted = np.concatenate([dense[None], pruned])
    places = samples_to_label(limit.risk, predicted, np.arange(len(index)), anytime=True)
    some = completed_labels(dense, {int(place): int(labels[place]) for place in places})
    full, few = ([losses(limit.risk, dense, each, truth) for each in pruned] for truth in (labels, some))
    p_full, p_few = (np.array([limit.p_value(each) for each in rows]) for rows in (full, few))
    anytime = replace(limit, anytime=True)
    stop = stopping_time(few, anytime)
    p_stop = [anytime.p_value(each[:stop]) for each in few]
    bentkus = [float(hoeffding_bentkus(limit.in_unit(each), limit.in_unit(limit.alpha))) for each in full]
    return {
        "all, hoeffding-bentkus": (fixed_sequence(bentkus, DELTA), len(index), 0.0),
        "all labels": (fixed_sequence(p_full, DELTA), len(index), 0.0),
        "where models disagree": (fixed_sequence(p_few, DELTA), len(places), float(np.abs(p_full - p_few).max())),
        "anytime, where they disagree": (fixed_sequence(p_stop, DELTA), int((places < stop).sum()), 0.0),
    }


def beta_losses(rng: np.random.Generator, n: int) -> Array:
    """Losses (n, models) such as 1 - IoU: Beta variables with means from 0.1 on, of models that share what is hard."""
    shared = rng.beta(2, 18, n)
    return np.stack([np.clip(shared + rng.beta(1, 19, n) * 20 * rate, 0, 1) for rate in CHANGED], axis=1)


def bounded(rng: np.random.Generator, n: int, draws: int) -> Iterator[Row]:
    """Bounds for losses in [0, 1] and for how much they grow, on a path; and the interval of a mean."""
    population = beta_losses(np.random.default_rng(SEED), 2_000_000)
    for risk in LOSS_RISKS:
        alpha = float(risk_losses(risk, population)[:, EDGE].mean()) - 3e-4
        yield from _bounded(risk, alpha, rng, n, draws)
    few = max(draws // 4, 50)
    intervals = [mean_interval(beta_losses(rng, 500)[:, 0], DELTA) for _ in range(few)]
    row: Row = {"part": "bounded losses", "method": "interval of a mean", "delta": DELTA, "n": 500, "draws": few}
    missed = [not each.low <= population[:, 0].mean() <= each.high for each in intervals]
    row |= {"violation_rate": float(np.mean(missed))}
    row |= {"mean_width": float(np.mean([each.high - each.low for each in intervals]))}
    yield row | {"hoeffding_width": 2 * math.sqrt(math.log(2 / DELTA) / (2 * 500))}


def risk_losses(risk: str, table: Array) -> Array:
    """Losses (n, models) of a risk, in its own range."""
    return table - table[:, :1] if risk == "loss-increase" else table


def _bounded(risk: str, alpha: float, rng: np.random.Generator, n: int, draws: int) -> Iterator[Row]:
    """How often every bound lets a model pass whose risk is above alpha, and how small those are that pass."""
    bounds: dict[str, Callable[[Array, float], Array]] = {
        "betting": betting,
        "e-process": e_process,
        "hoeffding-bentkus": hoeffding_bentkus,
        "hoeffding": hoeffding,
    }
    limit = RiskLimit(risk, alpha, DELTA)
    passed: dict[str, list[int]] = {name: [] for name in bounds}
    for _ in range(draws):
        table = limit.in_unit(risk_losses(risk, beta_losses(rng, n))).T
        for name, bound in bounds.items():
            passed[name].append(fixed_sequence(bound(table, limit.in_unit(alpha)), DELTA))
    for name, counts in passed.items():
        row: Row = {"part": "bounded losses", "risk": risk, "method": name, "delta": DELTA, "alpha": alpha, "n": n}
        sizes = [max(SIZES[count - 1] if count else 1.0, SIZES[EDGE - 1]) for count in counts]
        row |= {"draws": draws, "violation_rate": float(np.mean([count > EDGE for count in counts]))}
        yield row | {"mean_size": float(np.mean(sizes)), "oracle_size": SIZES[EDGE - 1]}


def stopping(rng: np.random.Generator, n: int, draws: int) -> Iterator[Row]:
    """One model whose risk is just above alpha, and somebody who stops whenever it looks good."""
    alpha, looks = 0.03, np.arange(100, n + 1, 100)
    peeked, wealthy = [], []
    for _ in range(draws):
        values = (rng.random(n) < alpha).astype(float)
        peeked.append(any(binomial(values[:look], alpha) <= DELTA for look in looks))
        wealthy.append(log_wealth(values, alpha).max() >= -math.log(DELTA))
    for method, results in (("binomial, looked at every 100", peeked), ("e-process, looked at after each", wealthy)):
        row: Row = {
            "part": "optional stopping",
            "method": method,
            "delta": DELTA,
            "alpha": alpha,
            "n": n,
            "draws": draws,
        }
        yield row | {"violation_rate": float(np.mean(results))}


def groups_that_grow(rng: np.random.Generator, n: int, draws: int) -> Iterator[Row]:
    """A model too bad in one group, a third of the samples; they come in three pieces, and it is looked at after each.

    Each piece comes only where the one before did not pass, as one does who wants it to.
    """
    alpha, rates = 0.03, np.array([0.03, 0.005])
    passed: dict[str, list[bool]] = {"e-process of each group": [], "binomial of each group, anew on all so far": []}
    for _ in range(draws):
        group = (rng.random(n) > 1 / 3).astype(int)
        values = (rng.random(n) < rates[group]).astype(float)
        limit = RiskLimit(alpha=alpha, delta=DELTA, anytime=True)
        budget = stake_budget(2 * DELTA, 0.0, 0, n)
        rows: tuple[CertificateRow, ...] = ()
        peeked = False
        for piece in np.array_split(np.arange(n), 3):
            if not (rows and rows[0].p_value <= DELTA):
                masks = {str(each): group[piece] == each for each in (0, 1)}
                rows = certify_anytime([Candidate("one", 1, values[piece])], limit, budget, masks, rows)[0].rows
            seen = slice(0, piece[-1] + 1)
            values_of = [values[seen][group[seen] == each] for each in (0, 1)]
            peeked |= max(float(binomial(each, alpha)) for each in values_of) <= DELTA
        passed["e-process of each group"].append(rows[0].p_value <= DELTA)
        passed["binomial of each group, anew on all so far"].append(peeked)
    for method, results in passed.items():
        row: Row = {"part": "groups, in pieces", "method": method, "delta": DELTA, "alpha": alpha, "n": n}
        yield row | {"draws": draws, "violation_rate": float(np.mean(results))}


def reuse(rng: np.random.Generator, n: int, draws: int) -> Iterator[Row]:
    """Six tests at most, each of a model chosen by all that was seen; those just above alpha or worse must not pass."""
    alpha, wrong, tests = 0.03, {"same samples, binomial": [], "one error budget": []}, []
    for _ in range(draws):
        table = (rng.random((len(REUSED), n)) < np.array(REUSED)[:, None]).astype(float)
        bad = table[np.array(REUSED) >= alpha]
        best = bad[np.argsort(bad.mean(axis=1))[:6]]
        wrong["same samples, binomial"].append(bool((binomial(best, alpha) <= DELTA).any()))
        failed, count = _spend(table, alpha)
        wrong["one error budget"].append(failed)
        tests.append(count)
    for method, results in wrong.items():
        row: Row = {"part": "adaptive reuse", "method": method, "delta": DELTA, "alpha": alpha, "n": n, "draws": draws}
        row |= {"violation_rate": float(np.mean(results)), "risks": REUSED}
        yield row | ({"mean_tests": float(np.mean(tests))} if method == "one error budget" else {"mean_tests": 6.0})


def _spend(table: Array, alpha: float) -> tuple[bool, int]:
    """Whether any of at most six tests is wrong, and how many there were before the samples were used up.

    In turns of the model that looked best so far and of the one that looked worst, of those not tested yet.
    """
    begins, lost, left = 0, 0.0, list(range(len(table)))
    for test in range(6):
        if begins >= table.shape[1]:
            return False, test
        budget = stake_budget(DELTA, lost, begins, table.shape[1])
        limit = RiskLimit(alpha=alpha, delta=budget.stake, anytime=True)
        choose = max if test % 2 else min
        model = choose(left, key=lambda each: table[each, :begins].sum())
        left.remove(model)
        values = table[model, begins:]
        stop = stopping_time([values], limit)
        passed = limit.p_value(values[:stop]) <= limit.delta
        if passed and REUSED[model] >= alpha:
            return True, test + 1
        lost, begins = lost + budget.stake * (not passed), begins + stop
    return False, 6


def own_nets(alpha: float) -> Iterator[Row]:
    """A path of ResNets on glyphs: labels that its certificate takes, on the held-out images that no run has seen."""
    with tempfile.TemporaryDirectory() as place, _ledger_of_its_own(Path(place)):
        root = Path(place)
        files = []
        for ratio in RATIOS:
            compress(Recipe("resnet10t", ratio, data="glyphs"), root / str(ratio), note=print)
            files.append(root / str(ratio) / SLIM)
        files.insert(0, root / str(RATIOS[0]) / DENSE)
        source = open_source("glyphs")
        samples = source.held_out
        (root / "images").mkdir()
        truth = {f"{place:04}.png": source.classes[label] for place, label in enumerate(samples.labels)}
        for place, name in enumerate(truth):
            samples.load(place).save(root / "images" / name)
        for anytime in (True, False):  # the second looks at all of them
            out = root / f"labels {anytime}"
            request = request_labels(files, str(root / "images"), Guarantee(alpha), out, Procedure(anytime))
            record = certify_answers(_answered(out / QUESTIONS, truth), out)
            seen = record.rows[0].n
            row: Row = {"part": "own nets", "method": "anytime" if anytime else "binomial", "model": "resnet10t"}
            row |= {"data": "glyphs", "ratios": RATIOS, "alpha": alpha, "delta": record.delta, "images": request.images}
            row |= {"labels_asked": request.to_label, "samples_seen": seen, "chosen": record.chosen}
            yield row | {"rows": [(each.errors, each.n, each.p_value) for each in record.rows]}


@contextmanager
def _ledger_of_its_own(folder: Path) -> Iterator[None]:
    """Other benchmarks certify on the same images, which the ledger in the user's cache remembers."""
    (folder / "cache").mkdir()
    (folder / "cache" / "baselines").symlink_to(cache_dir() / "baselines")
    with mock.patch.dict(os.environ, PXCOMPRESS_CACHE=str(folder / "cache")):
        yield


def own_task(kind: str, model: str, data: str, alpha: float) -> Row:
    """A certified run of a model that is no classifier, verified, and what was chosen on the test split."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        guarantee = Guarantee(alpha, risk="loss-increase", steps=2)
        recipe = Recipe(model, 0.5, data=data, guarantee=guarantee)
        report = compress(recipe, folder, note=print)
        record = report.certificate
        assert record is not None
        problems = verify(folder).problems
        workload = load_workload(recipe)
        ids = workload.splits.ids["test"]
        samples = ReservedSamples(data, workload.splits.test, ids, (), {"": len(ids)}, workload.task)
        files = [(name, size, folder / name) for name, size in ((DENSE, 1.0), (SLIM, 0.0))]
        fresh = judge_files(files, samples, guarantee.limit).rows
    row: Row = {"part": f"end to end, {kind}", "method": "betting", "model": model, "data": data, "alpha": alpha}
    row |= {"delta": record.delta, "n": record.n, "chosen": record.chosen_name, "problems": len(problems)}
    row |= {"rows": [(each.name, each.errors, each.n, each.p_value) for each in record.rows]}
    row |= {"test_n": fresh[1].n, "test_loss": fresh[1].errors / fresh[1].n}
    quality = {"quality_dense": report.dense.quality.value, "quality_certified": report.pruned.quality.value}
    return row | quality | {"macs_ratio": report.ratios.macs}


def _answered(path: Path, truth: dict[str, str]) -> Path:
    """The table, filled with the true classes."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    filled = path.with_name("filled.csv")
    with filled.open("w", newline="") as file:
        table = csv.DictWriter(file, ("image", "dense", "pruned", "label"))
        table.writeheader()
        table.writerows({**row, "label": truth[row["image"]]} for row in rows)
    return filled


def claims(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Validity of everything that the product does; that what it replaces is worse; labels saved."""
    naive = ("binomial, looked at every 100", "same samples, binomial", "binomial of each group, anew on all so far")
    by_key = {(row["part"], row.get("risk"), row["method"]): row for row in rows}
    for (part, risk, method), row in by_key.items():
        where = f"{part}, {risk + ', ' if risk else ''}{method}"
        if "violation_rate" in row:
            better, bound = ("higher", "above") if method in naive else ("lower", "at most")
            text = f"{where}: violation rate is {bound} delta + 2 Monte-Carlo standard errors"
            yield common.claim(text, row["violation_rate"], slack(row["draws"]), better)
        if method == "where models disagree":
            yield common.claim(
                f"{where}: largest difference to a p-value of all labels", row["largest_p_difference"], 0, "equal"
            )
        if "mean_labels" in row and not method.startswith("all"):
            yield common.claim(f"{where}: mean labels, of {row['n']}", row["mean_labels"], row["n"] / 4, "lower")
        if part == "own nets":
            text = f"{where}: labels asked for, of {row['images']} (chosen: model {row['chosen']} of {len(RATIOS)})"
            yield common.claim(text, row["labels_asked"], row["images"] / 10, "lower")
    yield from _power_claims(by_key)
    for row in (row for row in rows if row["part"].startswith("end to end")):
        where = f"{row['part']}, loss increase at most {row['alpha']:g}"
        text = f"{where}: loss increase of {row['chosen']!r} on {row['test_n']} test samples (target: alpha)"
        yield common.claim(text, row["test_loss"], row["alpha"], "lower")
        yield common.claim(f"{where}: problems that verify finds", row["problems"], 0, "equal")
        yield common.claim(f"{where}: MACs of what is certified (ratio)", row["macs_ratio"], 0.99, "lower")
    for risk in LOSS_RISKS:
        ours, others = (by_key["bounded losses", risk, name]["mean_size"] for name in ("betting", "hoeffding-bentkus"))
        text = f"bounded losses, {risk}: mean size certified by betting, oracle {SIZES[EDGE - 1]}"
        yield common.claim(f"{text} (target: hoeffding-bentkus)", ours, others, "lower")
    widths = by_key["bounded losses", None, "interval of a mean"]
    text = "bounded losses: mean width of the interval of a mean (target: Hoeffding's)"
    yield common.claim(text, widths["mean_width"], widths["hoeffding_width"], "lower")


def _power_claims(by_key: Mapping[tuple[str, str | None, str], Row]) -> Iterator[dict[str, Any]]:
    """Models that pass with labels only where they are needed, beside those with all labels."""
    few = "where models disagree"
    for (part, risk, method), row in by_key.items():
        if method == few:
            for other, better in (("all labels", "equal"), ("all, hoeffding-bentkus", "higher")):
                text = f"{part}, {risk}: mean number of models that pass, {few} (target: {other})"
                target = by_key[part, risk, other]["mean_models_passed"]
                yield common.claim(text, row["mean_models_passed"], target, better)


def main() -> None:
    quick = common.parser(__doc__ or "").parse_args().quick
    draws, n = (200, 1000) if quick else (2000, 2000)
    rng = np.random.default_rng(SEED)
    people = population(rng, 200_000)
    rows = [
        *few_labels(people, rng, n, draws),
        *bounded(rng, n, draws),
        *stopping(rng, n, draws),
        *reuse(rng, n, draws),
        *groups_that_grow(rng, n, draws),
    ]
    rows += [] if quick else [*own_nets(0.03), *(own_task(*run) for run in TASK_RUNS)]
    command = "python benchmarks/certify_reuse.py" + " --quick" * quick
    common.write("certify_reuse", command, rows, [SEED], list(claims(rows)))


if __name__ == "__main__":
    main()
