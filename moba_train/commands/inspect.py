"""What a recipe's data holds and what its stages will draw: moba-train inspect [key=value ...]

Takes the settings of `moba-train train`, prepares the token store where it is missing, and prints documents, tokens and
lengths by source, then each stage's rows, epochs and padding. A picture of both is written beside the store.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moba_train import resolved
from moba_train.commands.compose import run_hydra
from moba_train.config import Config
from moba_train.data.mix import build_mix, check_mix, stage_mix
from moba_train.data.store import TokenStore
from moba_train.data.survey import LONG, Holding, SourceDraw, holdings, source_draws
from moba_train.data.tally import DROPPED
from moba_train.data.tokens import prepare_store
from moba_train.model import tokenizer_path
from moba_train.report.data_figure import data_picture, format_length
from moba_train.schedule import Stage, build_schedule
from moba_train.validate import validate

PICTURE = "inspect.png"
MOST_PADDING = 0.01  # before a word is said
NARROWEST = 112  # columns: below that, rich would cut digits off


def main(arguments: list[str]) -> int:
    run_hydra("train", _job, arguments)
    return 0


def _job(composed: DictConfig) -> None:
    config = resolved.to_config(composed)
    validate(config)
    show(config, Console(width=max(Console().width, NARROWEST)))


def show(config: Config, console: Console) -> Path | None:
    """Print the tables; returns the picture, None where the store is others' to write to."""
    schedule = build_schedule(config)
    for stage in schedule.stages:  # before minutes of tokenising
        settings, key = stage_mix(config, stage.index)
        check_mix(settings, [source.name for source in config.data.train], key)
    stores = prepare_store(config.data, tokenizer_path(config.model))
    for split in ("train", "heldout"):
        if (stores / split).is_dir():
            print_store(TokenStore.open(stores / split), split, console)
    store = TokenStore.open(stores / "train")
    drawn = {
        stage.name: print_stage(store, config, stage, schedule.tokens_per_step, console) for stage in schedule.stages
    }
    picture = stores / PICTURE
    try:
        picture.write_bytes(data_picture(config.data.name, holdings(store), drawn))
    except OSError as error:
        _line(console, f"no picture: {escape(str(picture))} cannot be written ({error.strerror})")
        return None
    _line(console, f"picture: {escape(str(picture))}")
    return picture


def print_store(store: TokenStore, split: str, console: Console) -> None:
    """Documents, tokens, what was dropped and the lengths of a split."""
    found = holdings(store)
    _line(console, f"[bold]{split}[/]: {escape(str(store.path))}")
    console.print(_holdings_table(found))
    dropped = _dropped_table(store)
    if dropped.rows:
        console.print(dropped)
    console.print(_length_table(found[-1]))


def print_stage(
    store: TokenStore, config: Config, stage: Stage, tokens_per_step: int, console: Console
) -> list[SourceDraw]:
    """What a stage draws, from each source."""
    settings, key = stage_mix(config, stage.index)
    mix = build_mix(store, stage.context_length, config.run.seed + stage.index, settings, key)
    rows = stage.steps * tokens_per_step // stage.context_length
    draws = list(source_draws(store, mix, rows))
    _line(
        console,
        f"[bold]stage {stage.name}[/]: {stage.steps:,} steps, {rows:,} rows of {stage.context_length:,} tokens, "
        f"{mix.full_share:.1%} of them one full-length segment, {mix.padding_share:.2%} padding",
    )
    if mix.padding_share > MOST_PADDING:
        why = f"of {len(mix.rows):,} rows in {len(mix.pools)} pools, each pool's last is not full: add documents"
        if settings.most_padding > MOST_PADDING:
            why = f"{key}.most_padding={settings.most_padding} keeps documents whole: lower it"
        drop = f"or set {key}.full_rows=1 to drop rows that are not one document"
        _line(console, f"[yellow]more than {MOST_PADDING:.0%} padding:[/] {why}, {drop}")
    table = Table()
    _columns(table, "source", "tokens drawn", "share", "epochs")
    for draw in draws:
        table.add_row(escape(draw.name), f"{draw.tokens:,.0f}", f"{draw.share:.1%}", f"{draw.epochs:.2f}")
    console.print(table)
    return draws


def _holdings_table(found: list[Holding]) -> Table:
    table = Table()
    long = [f"≥ {format_length(least)}" for least in LONG]
    _columns(table, "source", "documents", "tokens", "median", "longest", *long)
    for one in found:
        counts = [f"{count:,}" for count in (one.documents, one.tokens, one.median, one.longest)]
        table.add_row(escape(one.name), *counts, *(f"{share:.1%}" for share in one.long_shares))
    return table


def _dropped_table(store: TokenStore) -> Table:
    """The records that gave no document, by reason; without a row where every record gave one."""
    sources = store.manifest["sources"]
    reasons = [reason for reason in DROPPED if any(source[reason] for source in sources)]
    table = Table(title="left out", title_justify="left")
    _columns(table, "source", "records", *(DROPPED[reason] for reason in reasons))
    for source in sources if reasons else []:
        table.add_row(escape(source["name"]), f"{source['records']:,}", *(f"{source[reason]:,}" for reason in reasons))
    return table


def _length_table(all_documents: Holding) -> Table:
    """Documents and tokens by length, a bar a power of two."""
    table = Table(title="lengths (tokens)", title_justify="left")
    _columns(table, "from", "documents", "tokens", "share")
    table.add_column("", justify="left")
    first = int((all_documents.documents_by_bin > 0).argmax())
    for index in range(first, len(all_documents.documents_by_bin)):
        tokens = int(all_documents.tokens_by_bin[index])
        share = tokens / all_documents.tokens
        documents = int(all_documents.documents_by_bin[index])
        table.add_row(
            format_length(1 << index), f"{documents:,}", f"{tokens:,}", f"{share:.1%}", "█" * round(40 * share)
        )
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def _columns(table: Table, first: str, *numbers: str) -> None:
    table.add_column(first)
    for number in numbers:
        table.add_column(number, justify="right")
