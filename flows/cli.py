"""`lwd`: the command line. Each command runs one Prefect flow or shows what the deployment holds."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.canary_command import canary
from flows.console import bold, console, out, red, say
from flows.data import app as data
from flows.keys import app as keys
from flows.once import App
from flows.robots import app as robots
from flows.run import run_flow, start_over
from flows.servers import app as servers
from infra import interrupts
from infra.errors import ConfigError
from infra.lifeline import kill_all
from infra.loopback import ask_directly
from infra.process import write_any_text
from infra.settings import default_home
from infra.surroundings import complete
from infra.unexpected import explained

app = App(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Learning while deploying: a fleet of robots whose shared policy improves from every episode.\n\n"
    "Begin with `lwd demo`. Then, step by step: `lwd train` (offline pipeline), `lwd online` (deploy and keep "
    "learning), `lwd promote` (gate), `lwd rollback`. Everything of one deployment lies below `--home`.",
)
contracts = App(no_args_is_help=True, help="Data contracts: check them, review what they refused.")
app.add_typer(contracts, name="contracts")
app.add_typer(data, name="data")
app.add_typer(robots, name="robots")
app.add_typer(servers, name="servers")
app.add_typer(keys, name="keys")
app.command()(canary)

Home = Annotated[Path, typer.Option(help="The deployment's folder; LWD_HOME, also in `.env`.")]
ParamsFile = Annotated[Path, typer.Option("--params", help="Parameters of pipeline and online stage.")]
Port = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Port of the Prefect server started for this command; any free one."),
]
HOME, PARAMS = default_home(), Path("params.yaml")
# typer carries its own copy of click, whose UsageError it does not export.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _say_version(wanted: bool) -> None:
    if wanted:
        out.print(f"lwd {installed('lwd')}")
        raise typer.Exit()


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over instead of going on from where it stopped.")
    ] = False,
    run_dir: Annotated[Path, typer.Option(help="Where the run and its report go.")] = Path("runs/demo"),
    params: ParamsFile = PARAMS,
    port: Port = None,
) -> None:
    """The whole loop on this machine, in minutes; ends with `runs/demo/report.html`.

    Ctrl-C stops cleanly; the same command goes on from there.
    """
    before = functools.partial(start_over, run_dir) if fresh else None
    run_flow("demo", run_dir, port, before=before, run_dir=str(run_dir), params_path=str(params))


@app.command()
def collect(home: Home = HOME, port: Port = None) -> None:
    """Bring demonstrations, rollouts and play up to date (stages of `dvc.yaml`)."""
    run_flow("collect", home, port)


@app.command()
def train(
    until: Annotated[str | None, typer.Option(help="Last stage to run, for example `buffer`.")] = None,
    home: Home = HOME,
    port: Port = None,
) -> None:
    """The offline pipeline: collect, validate, version, SFT, offline RL, evaluate, report."""
    run_flow("offline", home, port, until=until)


@app.command()
def online(home: Home = HOME, params: ParamsFile = PARAMS, port: Port = None) -> None:
    """Deploy to the simulated fleet and keep learning; supervises coordinator, learner and robots."""
    run_flow("online", home, port, home=str(home), params_path=str(params))


@app.command()
def evaluate(
    versions: Annotated[
        list[int] | None, typer.Argument(help="Policies; newest candidate and champion if none.")
    ] = None,
    episodes: Annotated[int | None, typer.Option(min=1, help="Per task; `evaluate.episodes` if not given.")] = None,
    home: Home = HOME,
    params: ParamsFile = PARAMS,
    port: Port = None,
) -> None:
    """Run policies on the same start states and show success with 95 % intervals."""
    records = run_flow(
        "evaluate", home, port, home=str(home), versions=versions, episodes=episodes, params_path=str(params)
    )
    table = Table("policy", "success", "95 %", "score", "cycle time, s")
    for name, record in records.items():
        s = record["success"]
        score, cycle = record["score"]["mean"], record["cycle_time_s"]["mean"]
        table.add_row(name, f"{s['mean']:.3f}", f"{s['low']:.3f}–{s['high']:.3f}", f"{score:.3f}", f"{cycle:.1f}")
    out.print(table)


@app.command()
def promote(
    version: Annotated[int | None, typer.Argument(help="Candidate; the newest if not given.")] = None,
    gate: Annotated[Path | None, typer.Option(help="Gate file; `flows/gates/default.yaml` if not given.")] = None,
    home: Home = HOME,
    params: ParamsFile = PARAMS,
    port: Port = None,
) -> None:
    """Ask the gate; promote on PASS. Exit code 0 on PASS, 10 on CONTINUE, 11 on FAIL."""
    answer = run_flow(
        "promote", home, port, home=str(home), version=version, gate=str(gate) if gate else None,
        params_path=str(params),
    )  # fmt: skip
    out.print(bold(answer["verdict"]), f": v{answer['candidate']} against v{answer['champion']}", sep="")
    raise typer.Exit({"PASS": 0, "CONTINUE": 10, "FAIL": 11}[answer["verdict"]])


@app.command()
def approve(
    version: Annotated[int, typer.Argument(help="The candidate that the gate proposed.")],
    approver: Annotated[str, typer.Option("--as", help="Your name, as it is enrolled: `lwd keys people`.")],
    key: Annotated[Path, typer.Option(help="The file of your private key.")],
    home: Home = HOME,
) -> None:
    """Approve a proposed candidate with your signature, and promote it. Shows the evidence that you sign."""
    from flows.deployment import deployment
    from flows.promotion import approve as sign

    with deployment(home) as plane:
        proposal = plane.registry.proposal(version)
        out.print(f"policy v{version} against v{proposal.against}, manifest {proposal.artifact_sha256}")
        for reason in proposal.evidence.get("reasons", []):
            out.print(f"  {reason}")
        sign(plane, version, approver, key)


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; goes into the audit.")] = "",
    actor: Annotated[str, typer.Option(help="Who.")] = "operator",
    home: Home = HOME,
) -> None:
    """Make the previous champion champion again, at once."""
    from flows.deployment import deployment

    with deployment(home) as plane:
        version = plane.registry.rollback(actor=actor, reason=reason or "not given")
    say(f"policy v{version} is champion again; production robots swap at their next episode boundary")


@app.command()
def overrule(
    version: Annotated[int, typer.Argument(help="Policy that robots refused.")],
    reason: Annotated[str, typer.Option(help="Why they are wrong; goes into the audit.")],
    actor: Annotated[str, typer.Option(help="Who.")],
    home: Home = HOME,
) -> None:
    """Let a policy be tried and promoted although robots said that they cannot run it."""
    from flows.deployment import deployment

    with deployment(home) as plane:
        robots = plane.registry.overrule_refusals(version, actor=actor, reason=reason)
    say(f"the refusals of policy v{version} by {', '.join(robots)} do not count")


@contracts.command("check")
def contracts_check(
    data: Annotated[list[Path], typer.Argument(help="Folders of shards, for example data/rollouts.")],
    contract: Annotated[str, typer.Option(help="Name or path of an ODCS contract.")] = "episode",
) -> None:
    """Check recorded episodes against a contract; exit code 3 if any is refused."""
    from data_contracts.checks import check_episode
    from data_contracts.contract import load_contract
    from data_contracts.shield import shield_of
    from data_contracts.suites import validate_buffer
    from infra.edge.shield import Limits
    from lwd_model.shards import read_buffer

    terms, refused, seen = load_contract(contract), 0, 0
    if terms.shield is not None:
        Limits.of(shield_of(terms))  # a robot would refuse it
    if terms.name == "offline_buffer":
        whole = [episode for folder in data for episode in read_buffer(folder)]
        report = validate_buffer(terms, whole)
        for v in report.violations:
            out.print(f"{v.severity:<5} {v.rule}: {v.message} ({v.owner})")
        out.print(f"{len(whole)} episodes, {'accepted' if report.success else 'refused'} as a whole")
        raise typer.Exit(0 if report.success else 3)
    for folder in data:
        for episode in read_buffer(folder):
            seen += 1
            broken = check_episode(terms, episode)
            refused += any(v.severity == "block" for v in broken)
            for v in broken:
                what = f"{episode.episode_id} {episode.source} {episode.task}"
                out.print(f"{v.severity:<5} {what}: {v.rule}: {v.message} ({v.owner})")
    out.print(f"{seen} episodes, {refused} refused")
    raise typer.Exit(3 if refused else 0)


@contracts.command("review")
def contracts_review(
    page: Annotated[Path, typer.Option(help="The page.")] = Path("runs/contracts.html"), home: Home = HOME
) -> None:
    """Write the stewards' page: contracts, results on the current snapshot, every refused episode with its reasons."""
    from data_contracts.contract import load_contract
    from data_contracts.review import write_review
    from data_contracts.suites import validate_batch
    from flows.deployment import deployment
    from flows.stages.common import QUARANTINE, read_refused

    names = ("episode", "transition", "offline_buffer")
    terms = [load_contract(name) for name in names]
    with deployment(home) as plane:
        held = plane.members()
        refused = plane.quarantined()
    if (QUARANTINE / "quarantine.json").exists():
        refused = read_refused() + refused
    reports = [validate_batch(terms[0], held)] if held else []
    out.print(f"review: {write_review(page, terms, reports, refused).resolve()}")


@app.command()
def snapshots(home: Home = HOME, last: Annotated[int, typer.Option(min=1, help="How many.")] = 20) -> None:
    """List the newest data snapshots."""
    from flows.deployment import deployment

    with deployment(home) as plane:
        latest = plane.snapshots.latest().version
        table = Table("version", "episodes", "added", "removed", "reason", "digest")
        for version in range(latest, max(0, latest - last), -1):
            s = plane.snapshots.get(version)
            table.add_row(str(s.version), str(s.episodes), str(s.added), str(s.removed), s.reason, s.digest[:12])
    out.print(table)


@app.command()
def policies(home: Home = HOME, last: Annotated[int, typer.Option(min=1, help="How many.")] = 20) -> None:
    """List the newest policies with their aliases, data, digests, and the robots that could not run them."""
    from flows.deployment import deployment
    from infra.policy.refusals import refusals

    with deployment(home) as plane:
        rows = plane.registry.policies()[:last]
        table = Table("version", "aliases", "status", "snapshot", "parent", "stage", "refused by")
        with plane.catalog.read() as connection:
            refused = {row["version"]: refusals(connection, row["version"]) for row in rows}
        table.add_column("manifest digest", overflow="fold", min_width=16)
        for row in rows:
            table.add_row(
                str(row["version"]), ", ".join(row["aliases"]), row["status"], str(row["snapshot_version"]),
                str(row["parent"] or ""), str((row["details"] or {}).get("stage", "")),
                ", ".join(refused[row["version"]]), row["manifest_sha256"],
            )  # fmt: skip
    out.print(table)


@app.command()
def report(
    home: Home = HOME,
    run_dir: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("runs/local/report"),
    params: ParamsFile = PARAMS,
    port: Port = None,
) -> None:
    """Build the HTML report of what pipeline and deployment hold now."""
    run_flow("report", home, port, run_dir=str(run_dir), home=str(home), params_path=str(params))


@app.command()
def status(home: Home = HOME) -> None:
    """Robots, learner, snapshot, quarantine and champion at a glance."""
    import sqlalchemy as sa

    from flows.deployment import deployment, read_json
    from infra.catalog import schema
    from infra.supervisor import isolated_parts

    with deployment(home) as plane:
        with plane.catalog.read() as connection:
            robots = list(connection.execute(sa.select(schema.robots).order_by(schema.robots.c.robot_id)))
        latest = plane.snapshots.latest()
        table = Table("robot", "cohort", "policy", "staged", "episodes", "last seen")
        for robot in robots:
            seen = f"{time.time() - robot.last_seen:.0f} s ago"
            table.add_row(
                robot.robot_id, robot.cohort, str(robot.active_version), str(robot.staged_version or ""),
                str(robot.episodes), seen,
            )  # fmt: skip
        out.print(table)
        out.print(f"snapshot {latest.version}: {latest.episodes} episodes; quarantine: {len(plane.quarantined())}; "
            f"unaccounted: {plane.unaccounted()}")  # fmt: skip
        out.print(f"champion: {plane.registry.alias('champion')}, previous: {plane.registry.alias('previous')}, "
            f"canary: {plane.registry.alias('canary')}")  # fmt: skip
        out.print(f"learner: {json.dumps(read_json(plane.settings.home / 'learner' / 'status.json'))}")
        for line in isolated_parts(plane.settings.home):
            out.print(line, markup=False)


@app.command()
def migrate(home: Home = HOME) -> None:
    """Create or upgrade the catalog's tables. Stop the deployment and back its catalog up first."""
    from infra.catalog import Catalog
    from infra.settings import load_settings

    catalog = Catalog(load_settings(home=home).catalog_url)
    before = catalog.revision()
    catalog.migrate()
    out.print(f"catalog: schema {before or 'none'} -> {catalog.revision()}")


@app.command()
def robot(
    bundle: Annotated[Path, typer.Argument(help="A policy's folder, for example models/sft/bundle.")],
    task: Annotated[str, typer.Option(help="Task key.")] = "S1",
    episodes: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the start states.")] = 0,
    pictures: Annotated[Path | None, typer.Option(help="Write a filmstrip of the first episode to this PNG.")] = None,
) -> None:
    """Run one robot against a policy and print what it did."""
    from infra.edge.inference import load_policy
    from infra.fleet.rollout import run_jobs
    from infra.fleet.sources import job_list

    if pictures is not None and (pictures.suffix.lower() != ".png" or not pictures.absolute().parent.is_dir()):
        raise ConfigError(f"--pictures {pictures} is no PNG in a folder that there is", "name a file that ends in .png")
    done = run_jobs(load_policy(bundle), job_list([task], episodes, seed, "evaluation"), source="rollout")
    for episode in done:
        out.print(
            f"{episode.outcome:<10} {episode.timestamps[-1]:5.1f} s  score {episode.score:.2f}  {episode.instruction}"
        )
    out.print(f"success {sum(e.success for e in done)}/{len(done)}")
    if pictures is not None:
        import numpy as np
        from PIL import Image

        from infra.fleet.filmstrip import render_episode

        frames = render_episode(task, done[0].extra["seed"], done[0].actions, frames=8, height=160, width=160)
        Image.fromarray(np.concatenate(list(frames), axis=1)).save(pictures)


def main() -> None:
    """Entry point: errors that a user can act on are printed with their fix, without a traceback."""
    write_any_text()
    interrupts.install(kill_all)
    ask_directly()
    sys.exit(guarded(_run))


def _run() -> Any:
    complete()
    return app(standalone_mode=False)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; its exit code."""
    from typer import rich_utils

    try:
        code = command()
        interrupts.check()
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except _UsageError as error:
        rich_utils.rich_format_error(error)  # type: ignore[arg-type]
        return ConfigError.exit_code
    except BrokenPipeError:  # the reader of the answers has seen enough: `lwd policies | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if interrupts.asked():  # a layer between here and there gave the stop another name
            return _stopped()
        known = explained(error)
        console.print(red("error:"), f" {known.problem}\n  ", bold("fix:"), f" {known.fix}", sep="", soft_wrap=True)
        return known.exit_code
    return code if isinstance(code, int) else 0


def _stopped() -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        say(f"\n{interrupts.MESSAGE}")
    return interrupts.exit_code()


if __name__ == "__main__":
    main()
