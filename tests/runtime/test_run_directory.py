"""What a run directory says of the code that made it."""

import re
import subprocess

from runtime import run_directory


def git(directory, *arguments):
    user = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", directory, *user, *arguments], check=True, capture_output=True)


def test_the_commit_and_what_was_changed_since_are_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "CHECKOUT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))   # no repository around it is meant
    assert run_directory.git_commit() is None
    git(tmp_path, "init")
    assert run_directory.git_commit() is None                             # nothing is committed
    code = tmp_path / "code.py"
    code.write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "a")
    commit = run_directory.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "samples.jsonl").write_text("{}\n")
    assert run_directory.git_commit() == commit                           # git does not know this file
    seen = {commit}
    for text in ("a = 2\n", "a = 3\n"):
        code.write_text(text)
        dirty = run_directory.git_commit()
        assert re.fullmatch(f"{commit}-dirty-[0-9a-f]{{8}}", dirty) and dirty not in seen
        seen.add(dirty)
    git(tmp_path, "add", "code.py")
    assert run_directory.git_commit() == dirty                            # staged or not
    code.write_text("a = 1\n")
    assert run_directory.git_commit() == commit


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_directory.git_commit() is None
