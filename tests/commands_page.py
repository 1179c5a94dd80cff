"""docs/commands.md as the program itself tells it: `make docs` writes it, a test compares it."""

from pathlib import Path

from typer.main import get_command

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"

HEAD = """\
# Commands

As `--help` prints them. The campaign of a command is `-C DIR`, else `$FLCTL_CAMPAIGN`, else the nearest folder upwards with a
`flctl.toml`. `--sites` takes `a b`, `a,b` or `all`, `--clients` of `partition` a number or names; the lists of `aggregate` are written `5,3,2` or `5 3 2`.

| exit code | meaning |
|---|---|
| 0 | what was asked was done (also: a tick that finds nothing to do) |
| 1 | internal error: a defect of flctl |
| 2 | usage: the command line cannot be meant |
| 3 | configuration: `flctl.toml`, a profile, a template, a secret's reference, a model folder |
| 4 | a login is needed: refused, or the site is held |
| 5 | a site cannot be reached |
| 6 | a job failed, or was refused by the scheduler |
| 7 | a transfer failed, or a hash differs |
| 8 | aggregation refused: a contribution that may not be averaged, or too few of them; `verify`, `audit`: something is not what was recorded |
| 9 | a budget or quota would be exceeded |
| 10 | another flctl holds the lock for more than 5 s, or moves the campaign now, or another host drives it |
| 11 | `--wait` ran out |
| 12 | unknown or changed host key |
| 130 | interrupted |

Of several, the first of 130, 1, 3, 12, 4, 5, 9, 7, 6, 8, 11 counts. With `--json` (`round`, `evaluate`, `plan`, `status`, `history`, `aggregate`, `verify`, `partition`,
`audit`, `gc`, `site list`, `site show`, `site test`, `site stage`, `auth test`, `login --status`, `campaign tick`) stdout is one object: `schema_version`, `command`, `status` (`ok`, `partial`: done, but something failed on the way, `error`),
`exit_code`, `data`, and `errors`, each with `code`, `site`, `message`, `hint`. `data` of `status` holds `campaign`, `model`
(`version`, `path`, `sha256`, `warnings` of the gates, `privacy`), `space` (`site`, `free`, `per_round`, `rounds`), `warnings` and `runs` (`site`, `number`, `attempt`, `work`, `base`, `round`, `stage`, `held`, `job_id`, `steps`,
`samples`, `queue_seconds`, `train_seconds`, `progress`: steps in its checkpoint, `attempts`: earlier ones, each with `cause` and `reason`, `note`, of a failed one `cause` and `hint`); that of `round` and `campaign tick` the same with `done` and `waiting`, and where a plan only evaluates, as that of `evaluate`, `evaluation` (`model`, `sites`); that of `history`: [Evaluation](evaluation.md); that of
`aggregate` the model's `path`, `sha256` and `bytes`, `seconds`, `contributions` (`site`, `path`, `weight`, `coefficient`), `state`,
`threads`, `ranks` and `notes`; that of
`partition` what partition.json holds, and `paths`; that of `verify` `version`, `agrees`, `rebuilt`, and the files `differing`, `missing` and `remade`;
that of `audit` `differences` (`file`, `round`, `what`), `notes`, `crossings` (`site`, `direction`, `round`, `kind`, `files`, `bytes`), `logins`,
`head`, `models`, `collected`, `lines`, `files`, `bytes`; that of `gc` `dry_run` and `items` (`site`, `path`, `bytes`); that of `plan` `first`, `target`, `steps`, `privacy`, `scripts` (paths) and `sites` (each with `node_hours_round`, `node_hours_plan`, `used`,
`budget`, `bytes_out`, `bytes_in`, `bytes_frozen`, `resident`, `logins`, `look`, `per_day`, `free`, `need`, `told`, `notes`, `problems`); that of `site list` `sites` (`name`, `title`,
`login`, `person`, `scheduler`, `transfer`, `checked`, `questions`, `fill_in`, `path`); that of `site show` the same for one, with `shipped` and
`profile` (all keys, times in seconds); that of `login --status` `connections` (`site`, `host`, `since`, `until`, `alive`); that of `site
stage` `site` and `staged` (`name`, `path`, `files`, `size`, `sent`).
"""


def page() -> str:
    from flctl.cli.main import app

    return HEAD + "".join(_sections(get_command(app), ["flctl"]))


def _sections(command, words: list[str]) -> list[str]:  # type: ignore[no-untyped-def]
    context = command.context_class(command, info_name=" ".join(words), terminal_width=100, max_content_width=100)
    sections = [f"\n## {' '.join(words)}\n\n```\n{command.get_help(context)}\n```\n"]
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        sections += _sections(inner, [*words, name])
    return sections


if __name__ == "__main__":
    PAGE.write_text(page())
