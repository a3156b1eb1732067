"""What a person sees of a run: a line for each step as it starts, and Table 1 as soon as it is there."""

import logging
import sys
from collections import Counter
from pathlib import Path

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.logging import logger
from snakemake.settings.enums import Quietness
from snakemake.workflow import Workflow
from snakemake_interface_logger_plugins.common import LogEvent

from fortify.workflow.steps import split_and_seed


class Progress(logging.Handler):
    """Shows a run of ``workflow`` in the profile's folder ``build``, in place of Snakemake's own lines.

    It is a handler of Snakemake's log. Steps and failures go to stderr; Table 1, and where the rest is, to
    stdout. Table 1 is shown when the rule ``results`` has finished, or at the end where it was up to date,
    and only in a run whose targets need it. Seeds are named where ``seeds``, the profile's, are several.
    Snakemake's warnings and errors stay, and its whole log is a file in ``.snakemake/log``.
    """

    def __init__(self, workflow: Workflow, build: str, *, seeds: list[int]) -> None:
        super().__init__(logging.INFO)
        self.workflow, self.build, self.several = workflow, Path(build), len(seeds) > 1
        self.left = Counter()  # jobs of each rule that have not finished, targets without files among them
        self.total, self.numbers, self.names = 0, {}, {}  # of the jobs that are counted; by job id
        self.table_shown = False

    def emit(self, record: logging.LogRecord) -> None:
        """Show what the ``record`` says; an error in doing so is printed and stops no run."""
        try:
            self._show(record)
        except Exception:
            self.handleError(record)

    def _show(self, record):
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self.left = Counter(record.stats)
            del self.left["total"]
            self.total = sum(self.left[rule] for rule in self._with_files())
        elif event == LogEvent.JOB_INFO:
            self._start(record.jobid, record.rule_name, record.wildcards.get("run"))
        elif event == LogEvent.JOB_FINISHED:
            self._finish(self.names[record.job_id][0])
        elif event == LogEvent.JOB_ERROR:
            files = ", ".join(map(str, record.log))
            _say(f"{self.names[record.jobid][1]} failed{f'; see {files}' if files else ''}")
        elif record.msg == NOTHING_TO_BE_DONE_MSG:
            rules = {job.rule.name for job in self.workflow.dag.jobs} & self._with_files()
            _say(f"{'everything' if len(rules) > 1 else _words(*rules)} is up to date")
            self._end()

    def _with_files(self):
        """Names of the rules that make something; ``all`` and the like are not counted."""
        return {rule.name for rule in self.workflow.rules if rule.output}

    def _start(self, job, rule, run):
        words = [_words(rule)]
        if run:
            split, seed = split_and_seed(run)
            words += [split, f"seed {seed}"] if self.several else [split]
        self.names[job] = rule, ", ".join(words)
        if rule in self._with_files():  # a job that is tried again keeps its number
            number = self.numbers.setdefault(job, len(self.numbers) + 1)
            counted = f"{number} of {self.total}: " if self.total > 1 else ""
            _say(counted + self.names[job][1])

    def _finish(self, rule):
        self.left[rule] -= 1
        self.left += Counter()
        if rule == "results":
            self._show_table()
            if rest := [_words(name) for name in self.left if name in self._with_files()]:
                _say(f"Table 1 is ready. Still to come, and no part of it: {', '.join(rest)}.")
        if not self.left:
            self._end()

    def _end(self):
        rules = {job.rule.name for job in self.workflow.dag.jobs}
        if "results" not in rules:
            return
        if not self.table_shown:
            self._show_table()
        places = {"Figures": self.build / "figures", "Tables": self.build / "tables"}
        if "html" in rules:
            places["Pages"] = self.build / "html" / "index.html"
        _print_places(places)

    def _show_table(self):
        print(f"\n{(self.build / 'tables' / 'table1.txt').read_text(encoding='utf-8')}", flush=True)
        notebook = self.build / "notebooks" / "05_results.ipynb"
        _print_places(
            {"Its figure": self.build / "figures" / "robustness_curves.png", "Its notebook": notebook}
        )
        self.table_shown = True


def show_progress(workflow: Workflow, build: str, *, seeds: list[int]) -> None:
    """Show the run that ``workflow`` is about to begin by :class:`Progress`, if rules are to be quiet.

    Nothing is shown of a dry run, nor in a job of its own, as on a cluster.
    """
    options = workflow.output_settings
    if workflow.is_main_process and not options.dryrun and Quietness.RULES in (options.quiet or ()):
        for handler in logger.handlers:
            if handler.name == "DefaultStreamHandler":
                handler.setLevel(logging.WARNING)
        logger.addHandler(Progress(workflow, build, seeds=seeds))


def _words(rule):
    return rule.replace("_", " ")


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _print_places(places):
    print("   ".join(f"{name}: {path}" for name, path in places.items()), flush=True)
