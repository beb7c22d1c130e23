"""``srlora plot`` draws the paper's Figures 3, 4 and 5 from the folders of runs, ended or not, one or several."""

from __future__ import annotations

from pathlib import Path

import jsonargparse


def run(argv: list[str]) -> None:
    """Draw, and print which files were written and what was left out.

    Raises:
        ValueError: An option is unknown, or a folder holds no run, no metrics or no such site.
    """
    options = _parse(argv)
    from srlora_dist.training.figures.drawing import compare  # a second of imports
    from srlora_dist.training.figures.runs import RunFiles, name_runs

    runs = [RunFiles.read(folder) for folder in options.runs]
    name_runs(runs, options.labels)
    alone = runs[0].folder / "figures" if len(runs) == 1 else Path("figures")
    paths, left_out = compare(runs, Path(options.output).expanduser() if options.output else alone, options.site)
    for line in [*paths, *left_out]:
        print(line)


def _parse(argv: list[str]) -> jsonargparse.Namespace:
    parser = jsonargparse.ArgumentParser(prog="srlora plot", description=__doc__, exit_on_error=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Output folder of a run.")
    parser.add_argument("--output", help="Folder of the figures; figures/ of the run, or here for several runs.")
    parser.add_argument("--labels", nargs="+", help="What to call each run; runs of one label are one curve.")
    parser.add_argument("--site", help="Figure 5: a part of the site's name; without it the site in the middle.")
    try:
        return parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        raise ValueError(f"{error}; see srlora plot --help for the options") from error
