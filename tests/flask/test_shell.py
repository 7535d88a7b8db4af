"""``flask shell``, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import fictive_sqlalchemy
from tests.wire import WireProxy

APP = """
    import os

    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy

    from fictive_sqlalchemy.ext.flask import FilterByOrCreateMixin, OptInTransactionMixin

    class Database(OptInTransactionMixin, FilterByOrCreateMixin, SQLAlchemy):
        pass

    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE"]
    db = Database(app)

    class User(db.Model):
        id = db.Column(db.Integer, primary_key=True)
        name = db.Column(db.String, nullable=False, unique=True)
"""

INPUT = """
db.create_all()
with db.session.begin():
    db.session.add(User(name="Ada"))

User.query.count()
User.filter_by_or_create(name="Grace").id
db.session.add(User(name="Ada"))
db.session.commit()
[user.name for user in User.query.order_by("id")]
db.session().in_transaction()
"""


def test_the_shell_has_the_models_and_the_session(
    tmp_path: Path, wire_url: str, wire: WireProxy
) -> None:
    (tmp_path / "app.py").write_text(dedent(APP))
    package = Path(fictive_sqlalchemy.__file__).parents[1]
    environment = {**os.environ, "DATABASE": wire_url, "PYTHONPATH": str(package)}
    environment.pop("PYTHONSTARTUP", None)
    with wire.record() as recording:
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "app", "shell"],
            cwd=tmp_path,
            env=environment,
            input=INPUT.lstrip(),
            capture_output=True,
            check=False,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    # An error leaves the session as good as new, also for somebody who types.
    assert "IntegrityError" in done.stderr
    answers = [line.replace(">>> ", "").replace("... ", "") for line in done.stdout.splitlines()]
    assert [answer for answer in answers if answer] == ["1", "2", "['Ada', 'Grace']", "False"]
    verbs = recording.verbs[recording.verbs.index("CREATE") :]
    assert verbs[:4] == ["CREATE", "COMMIT", "INSERT", "SELECT"]
    assert verbs[-2:] == ["INSERT", "SELECT"]
