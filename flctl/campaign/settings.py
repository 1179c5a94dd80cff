"""Owns the settings that a new campaign begins with: another flctl.toml's, with a name and an id of its own."""

import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from flctl.campaign.config import Configuration
from flctl.campaign.creation import toml_lines
from flctl.campaign.workspace import Workspace, write_atomic
from flctl.errors import ConfigurationError
from flctl.facility.table import load_table

_CAMPAIGN = re.compile(r"^\[campaign\].*?(?=^\[|\Z)", re.MULTILINE | re.DOTALL)


class Settings:
    """The text of a flctl.toml that may lack `campaign.name` and `campaign.id`, read and found to be one.
    ConfigurationError."""

    def __init__(self, path: Path) -> None:
        try:
            self._text = path.read_text(encoding="utf-8")
            self._campaign = dict(tomllib.loads(self._text).get("campaign", {}))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"cannot read the settings {path}: {error}") from None
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            copy.write_text(self._with({"name": "a", "id": "00000000"}), encoding="utf-8")
            try:
                self._seed = load_table(copy, Configuration).campaign.seed
            except ConfigurationError as error:
                raise ConfigurationError(error.message.replace(str(copy), str(path)), hint=error.hint) from None

    @property
    def seed(self) -> int:
        return self._seed

    def apply(self, workspace: Workspace) -> None:
        """Put them in place of the campaign's own. What flctl init made (name, id, seed, a frozen base) stays."""
        target = workspace.root / "flctl.toml"
        made = tomllib.loads(target.read_text(encoding="utf-8"))["campaign"]
        write_atomic(target, self._with({key: made[key] for key in made if key != "min_sites"}).encode())

    def _with(self, campaign: Mapping[str, object]) -> str:
        table = f"[campaign]\n{toml_lines({**self._campaign, **campaign})}\n\n"
        if _CAMPAIGN.search(self._text):
            return _CAMPAIGN.sub(lambda _: table, self._text, count=1)
        return table + self._text
