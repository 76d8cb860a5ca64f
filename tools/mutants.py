"""Can the tests fail? Changes a module in many small ways, in a copy, and lists the changes its tests do not notice.

    python tools/mutants.py mixed                     # every mutant of the module, against tests/test_mixed.py
    python tools/mutants.py losses --limit 40         # 40 of them, sampled
    python tools/mutants.py core --tests "tests/test_layers.py tests/test_data.py"

Cosmic Ray (`pip install -e ".[mutants]"`) makes the mutants: it changes numbers, default values among them, operators,
comparisons, conditions and decorators. Each one costs a run of the tests, in a process that is killed when it hangs.
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkResult

root = Path(__file__).resolve().parents[1]

# One change for each operator, not all of them: `a*b` becomes `a/b`, and `int|None` in an annotation stays.
CONFIG = r"""
[cosmic-ray]
module-path = "self_supervised_bt/{module}.py"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = [
    "core/ReplaceBinaryOperator_(?!Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul)",
    "core/ReplaceComparisonOperator_(?!Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)",
    "core/ReplaceUnaryOperator_(?!USub_UAdd|Delete_Not)",
]
"""


def run(*args, folder, **kwargs):
    "Run a command in the copy, with one thread"
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(args, cwd=folder, env=env, **kwargs)


def cosmic_ray(*args, folder):
    program = Path(sys.executable).parent/args[0]
    run(program, *args[1:], folder=folder, check=True, stdout=subprocess.DEVNULL)


def copy_to(folder):
    for name in ("self_supervised_bt", "tests", "tools"):
        shutil.copytree(root/name, folder/name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root/"pyproject.toml", folder)


def seconds_of_tests(tests, folder):
    "How long the tests take on the module as it is; they must pass"
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-x", "-q", *tests.split()]
    done = run(*command, folder=folder, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{tests} must pass before anything is changed:\n{done.stdout[-2000:]}{done.stderr}")
    return time.perf_counter() - start


def sample(session, limit, seed):
    "Leave `limit` mutants to run; returns how many are left and how many there were"
    with use_db(session, WorkDB.Mode.open) as db:
        items = sorted(db.pending_work_items, key=lambda item: (item.mutations[0].start_pos, item.job_id))
        rest = random.Random(seed).sample(items, max(0, len(items) - limit)) if limit else []
        for item in rest: db.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
        return len(items) - len(rest), len(items)


def changed_lines(diff):
    "The lines of a diff that say what was changed"
    lines = [line for line in diff.splitlines() if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")]
    return "\n".join(f"      {line[0]} {line[1:].strip()}" for line in lines)


def report(session):
    "A table of survivors; returns (mutants run, survivors)"
    with use_db(session, WorkDB.Mode.open) as db:
        results = {job: r for job, r in db.results if r.worker_outcome != WorkerOutcome.SKIPPED}
        mutations = {item.job_id: item.mutations[0] for item in db.work_items}
    survivors = [job for job, result in results.items() if not result.is_killed]
    for job in sorted(survivors, key=lambda job: mutations[job].start_pos):
        m = mutations[job]
        print(f"{m.module_path}:{m.start_pos[0]} {m.definition_name or ''} {m.operator_name.removeprefix('core/')}")
        print(changed_lines(results[job].diff))
    return len(results), len(survivors)


def main(module, tests, limit, seed):
    os.nice(10)
    tests = tests or f"tests/test_{module}.py"
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        copy_to(folder)
        seconds = seconds_of_tests(tests, folder)
        config = CONFIG.format(module=module, tests=tests, python=sys.executable, timeout=30 + 4*seconds)
        (folder/"cosmic-ray.toml").write_text(config)
        session = folder/"session.sqlite"
        cosmic_ray("cosmic-ray", "init", "cosmic-ray.toml", session, folder=folder)
        cosmic_ray("cr-filter-operators", session, "cosmic-ray.toml", folder=folder)
        n, of = sample(session, limit, seed)
        print(f"{n} of {of} mutants of {module}, at most {n*seconds/60:.0f} minutes", flush=True)
        cosmic_ray("cosmic-ray", "exec", "cosmic-ray.toml", session, folder=folder)
        ran, survived = report(session)
    print(f"{ran - survived} of {ran} mutants of {module} were noticed by {tests}, {survived} were not")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("module", help="name of the module, e.g. mixed")
    p.add_argument("--tests", help="test files, tests/test_MODULE.py if not given")
    p.add_argument("--limit", type=int, default=0, help="how many mutants to sample; all if 0")
    p.add_argument("--seed", type=int, default=0, help="of the sample")
    main(**vars(p.parse_args()))
