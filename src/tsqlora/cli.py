"""The `tsqlora` command: one small function a verb."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from tsqlora import __version__
from tsqlora.arguments import Parser
from tsqlora.claims import claimed
from tsqlora.completion import SHELLS
from tsqlora.config import METRICS, RunConfig
from tsqlora.endings import told
from tsqlora.errors import ConfigError, TsqloraError
from tsqlora.interruption import Terminated, handling, stop
from tsqlora.progress import Sayings, hide_others

Result = dict[str, Any]
logger = logging.getLogger("tsqlora")


def train(arguments: argparse.Namespace) -> Result:
    """The whole way: score, plan, train, evaluate, report."""
    run = _run(arguments)
    run.train()
    metrics = run.evaluate()
    report = run.report()
    return {
        "run": str(run.folder.path),
        "adapter": str(run.folder.adapter),
        "report": str(report),
        "metrics": metrics,
    }


def score(arguments: argparse.Namespace) -> Result:
    """Quality scores only: which rows look wrong, ranked for a spreadsheet; a cleaned data set."""
    from tsqlora import processes
    from tsqlora.cleaned import check_clean
    from tsqlora.score_only import drop_count, leave_files

    drop, clean = drop_count(arguments.drop), arguments.write_clean and Path(arguments.write_clean)
    if drop is not None and clean is None:
        raise ConfigError("--drop says what --write-clean leaves out: name its file.")
    config = _config(arguments)
    if clean is not None:
        check_clean(config.data.train, clean)
    run = _run(arguments, config, scoring=True)
    scores = run.score()
    left = processes.from_main(lambda: leave_files(run, scores, clean, drop))
    return {
        "scores": str(run.folder.scores),
        "samples": len(scores.ids),
        "wrong_share": None if scores.wrong_share != scores.wrong_share else scores.wrong_share,
        "verdict": scores.verdict,
        "effective_samples": scores.effective_samples,
        **left,
    }


def plan(arguments: argparse.Namespace) -> Result:
    """Layer sensitivity and the rank plan only."""
    run = _run(arguments)
    made = run.plan()
    if arguments.format:
        from tsqlora.pasting import PEFT, paste
        from tsqlora.starting import (
            first_directions,
            planned_config,
            save_untrained,
            untrained_model,
        )

        if arguments.format != PEFT:
            directions = first_directions(run.config, run.folder)
            model = untrained_model(run.config, run.inputs.base_model(), made, directions)
            save_untrained(model, run.folder.untrained)
        like = planned_config(run.config, made)
        return {"paste": paste(made, arguments.format, run.folder.untrained.resolve(), like)}
    return {
        "plan": str(run.folder.plan),
        "parameters": made.parameters,
        "budget": made.budget,
        "ranks": made.ranks,
        "rank_pattern": made.rank_pattern(),
        "alpha_pattern": made.alpha_pattern(),
    }


def evaluate(arguments: argparse.Namespace) -> Result:
    """Metrics of a finished run."""
    from tsqlora.finished import FinishedRun
    from tsqlora.pipeline import Run

    if arguments.data:
        return dict(FinishedRun.open(arguments.run).evaluate_on(arguments.data))
    return Run.open(arguments.run).evaluate()


def export(arguments: argparse.Namespace) -> Result:
    """The adapter of a finished run in another form."""
    from tsqlora.finished import FinishedRun

    out = FinishedRun.open(arguments.run).export(arguments.format, Path(arguments.out))
    return {"exported": str(out)}


def report(arguments: argparse.Namespace) -> Result:
    """report.html again."""
    from tsqlora.report import write_report

    return {"report": str(write_report(arguments.run))}


def demo(arguments: argparse.Namespace) -> Result:
    """The embedded default: plain LoRA against TsqLoRA on generated support messages."""
    from tsqlora.demo import run_demo

    return run_demo(Path(arguments.out), seed=arguments.seed)


def init(arguments: argparse.Namespace) -> Result:
    """A commented starting configuration for a data set, from a look at it."""
    from tsqlora.first_config import write

    seen = _seen(arguments, arguments.data)
    out = Path(arguments.out or f"{seen.name}.yaml")
    write(seen, out, arguments.force)
    return {"written": str(out), **seen.summary()}


def completion(arguments: argparse.Namespace) -> Result:
    """A script that completes verbs, options, files and folders in a shell."""
    from tsqlora.completion import completion_script

    return {"paste": completion_script(parser(), arguments.shell)}


def parser() -> argparse.ArgumentParser:
    """Verbs and their arguments."""
    top = Parser(prog="tsqlora", description="Sensitivity- and quality-aware low-rank adaptation.")
    top.add_argument("--version", action="version", version=f"tsqlora {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    for verb in (train, score, plan):
        sub = _verb(verbs, verb)
        if verb is score:
            _add_score(sub)
        else:
            sub.add_argument("config", metavar="CONFIG.yaml")
        sub.add_argument("--set", action="append", default=[], metavar="section.key=value")
        sub.add_argument("--resume", action="store_true", help="go on with an unfinished run")
        if verb is plan:
            sub.add_argument(
                "--format",
                choices=("peft", "axolotl", "llamafactory"),
                help="print the plan as text to paste into a LoraConfig or that trainer's YAML",
            )
    sub = _verb(verbs, evaluate)
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument("--data", metavar="F", help="another data file instead of the run's splits")
    sub = _verb(verbs, export)
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub.add_argument(
        "--format",
        choices=("compact", "padded", "merged"),
        default="compact",
        help="compact: true ranks, for PEFT and vLLM; padded: one rank, right everywhere: use "
        "padded for llama.cpp, TGI and SGLang; merged: a plain model, a quantised base dequantised",
    )
    sub.add_argument("--out", required=True, metavar="DIR")
    sub = _verb(verbs, report)
    sub.add_argument("run", metavar="RUN", help="run folder")
    sub = _verb(verbs, init)
    sub.add_argument("data", metavar="DATA", nargs="+", help="files, globs, a folder or a hub name")
    _add_columns(sub)
    sub.add_argument("--out", metavar="F.yaml", help="by default named after the data, here")
    sub.add_argument("--force", action="store_true", help="write over a file that is there")
    sub = _verb(verbs, demo)
    sub.add_argument("--out", default="runs/demo", metavar="DIR")
    sub.add_argument("--seed", type=int, default=0)
    sub = _verb(verbs, completion)
    sub.add_argument("shell", choices=SHELLS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Exit status: 0 done, 2 the user's mistake, 130 interrupted by Ctrl-C and 143 by
    SIGTERM, 1 our fault.
    """
    arguments = (top := parser()).parse_args(argv)
    if arguments.verb is None:
        top.print_help(sys.stderr)
        return 2
    _say_only_what_matters()
    verb: Callable[[argparse.Namespace], Result] = globals()[arguments.verb]
    try:
        # the Trainer prints; stdout is for the result alone
        with handling(stop), redirect_stdout(sys.stderr), ExitStack() as arguments.held:
            result = verb(arguments)
    except TsqloraError as error:
        _say_once(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        remedy = " and --resume" if "resume" in arguments else ""
        _say_once(f"interrupted; go on with the same command{remedy}.")
        return 143 if isinstance(interrupt, Terminated) else 130
    except Exception:
        if _speaks():
            raise
        return 1  # another process has failed, and this one for want of it
    if not _is_first():
        return 0
    text = result.get("paste") or told(arguments.verb, result, arguments)
    try:
        print(json.dumps(result, indent=2) if arguments.json else text, flush=True)
    except BrokenPipeError:  # whoever reads it, as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _add_score(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "config", metavar="CONFIG.yaml|DATA", nargs="+", help="a configuration, or the data itself"
    )
    _add_columns(sub)
    sub.add_argument("--out", metavar="DIR", help="of DATA: the run folder (runs/score-NAME)")
    sub.add_argument(
        "--write-clean",
        metavar="F",
        help="the data without the likely wrong rows: .jsonl, .csv, "
        ".tsv or .parquet; the same kind of file keeps each row as it is",
    )
    sub.add_argument(
        "--drop",
        metavar="N|SHARE",
        help="leave out so many of the first ranked instead: 200, or 10%%",
    )


def _one(given: list[str] | None) -> str | list[str] | None:
    """The only one of several, or all."""
    return given[0] if given is not None and len(given) == 1 else given


def _add_columns(sub: argparse.ArgumentParser) -> None:
    """What a look at the data would otherwise choose."""
    sub.add_argument(
        "--text", nargs="+", metavar="COLUMN", help="the input: a column, two, or a template"
    )
    sub.add_argument("--target", metavar="COLUMN", help="the label, number or answer")
    sub.add_argument("--task", choices=tuple(METRICS))
    sub.add_argument("--model", help="a folder or a hub name")


def _say_once(message: str) -> None:
    """On stderr, by the first of several processes that has something to say."""
    if _speaks():
        print(f"tsqlora: {message}", file=sys.stderr)


def _speaks() -> bool:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    from tsqlora import processes

    return processes.speaks()


def _say_only_what_matters() -> None:
    """Our own account on stderr, errors of the libraries, and warnings where `-W` asks for them."""
    hide_others()
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[Sayings()])
    logging.getLogger("tsqlora").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _verb(verbs: Any, function: Callable[[argparse.Namespace], Result]) -> argparse.ArgumentParser:
    description = (function.__doc__ or "").strip()
    sub: argparse.ArgumentParser = verbs.add_parser(
        function.__name__, help=description, description=description
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    return sub


def _seen(arguments: argparse.Namespace, data: list[str]) -> Any:
    """A look at the data that arguments name."""
    from tsqlora.seeing import see

    given = arguments.task, _one(arguments.text), arguments.target, arguments.model
    return see(_one(data) or "", *given)


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that arguments name or, of `score`, that fits the data they name."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from tsqlora import processes

        processes.join()  # so that one speaks for all
    if arguments.verb != "score":
        return RunConfig.from_yaml(arguments.config, arguments.set)
    named = [
        name for name in ("text", "target", "task", "model", "out") if getattr(arguments, name)
    ]
    if Path(arguments.config[0]).suffix.lower() not in (".yaml", ".yml"):
        from tsqlora.score_only import score_config

        seen = _seen(arguments, arguments.config)
        logger.info("task %s, %s: %s", seen.chosen.task, seen.chosen.data, seen.chosen.why)
        return score_config(seen, arguments.out, arguments.set)
    if named or len(arguments.config) > 1:
        raise ConfigError(
            f"--{named[0]} is for data without a configuration: change the file, or use --set."
            if named
            else "give one configuration, or data files alone."
        )
    arguments.config = arguments.config[0]
    return RunConfig.from_yaml(arguments.config, arguments.set)


def _run(
    arguments: argparse.Namespace, config: RunConfig | None = None, scoring: bool = False
) -> Any:
    config = config or _config(arguments)
    if _is_first():
        arguments.held.enter_context(claimed(config.output))
    from tsqlora.pipeline import Run

    return Run.start(config, arguments.resume, scoring)


def _is_first() -> bool:
    """Of several processes (`accelerate launch`) the first acts, and tells the result, for all."""
    return os.environ.get("RANK", "0") == "0"
