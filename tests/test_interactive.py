"""--interactive, in a real pseudo-terminal: pytest tests/test_interactive.py"""

from pathlib import Path

import hf_models
import processes
import pytest
import test_gpt
from test_gpt import argv, tree

import gpt
import gpt_hf
import gpt_tiktoken

STAGES = dict(gpt={}, gpt_tiktoken=dict(tokenizer="custom", vocab_size=290))
LENGTH = dict(interactive=True, device="cpu", dtype="float32", max_new_tokens=12)
CTRL_C, CTRL_D = b"\x03", b"\x04"


@pytest.fixture(scope="module", params=["gpt", "gpt_tiktoken", "gpt_hf"])
def trained(request, tmp_path_factory):
    """(the script, the command line that plays with a model of its)."""
    folder = tmp_path_factory.mktemp(request.param)
    text, run = folder / "songs.txt", folder / "run"
    if request.param == "gpt_hf":
        text.write_text(hf_models.corpus(), encoding="utf-8")
        hf_models.save(folder / "gpt2", hf_models.gpt2())
        gpt_hf.main(argv(input=text, model_name=folder / "gpt2", output_dir=run, max_steps=1, block_size=32,
                         device="cpu", max_new_tokens=5))
        return gpt_hf, argv(output_dir=run, **LENGTH)
    text.write_text(test_gpt.TEXT, encoding="utf-8")
    stage = dict(gpt=gpt, gpt_tiktoken=gpt_tiktoken)[request.param]
    stage.main(argv(**test_gpt.TINY | STAGES[request.param] | dict(input=text, run_dir=run)))
    return stage, argv(run_dir=run, **LENGTH)


def test_it_continues_what_is_typed_again_and_again_until_ctrl_d(trained):
    stage, line = trained
    before = tree(Path(line[1]).parent)
    typed = [b"Noc nad\n", "Ω\n".encode(), b"Noc \xb3\n", b"\n", b"Noc nad\n", CTRL_D]
    shown, status = processes.talk(stage.__file__, line, typed)
    print(shown)
    assert status == 0 and "Traceback" not in shown
    assert tree(Path(line[1]).parent) == before  # no file is written
    first, *answers, last = shown.split("\n> ")
    assert "Ctrl-D" in first and not last.strip("^D\b\n")
    noc, omega, broken, _, again = (answer.partition("\n")[2] for answer in answers)
    assert noc.startswith("Noc nad") and len(noc) > len("Noc nad") and noc != again.rstrip()
    assert "decode" in broken and "\n" not in broken.strip()  # one line
    if stage is gpt:  # it knows the characters of its text alone
        assert "Ω" in omega and "\n" not in omega.strip()
    else:
        assert omega.startswith("Ω")


def test_ctrl_c_ends_it_with_one_line(trained):
    stage, line = trained
    shown, status = processes.talk(stage.__file__, line, [b"Noc\n", CTRL_C])
    assert status == 130 and shown.rstrip().endswith("stopped") and "Traceback" not in shown


def test_it_needs_a_model_and_no_folder_to_write_to(trained, tmp_path, capsys):
    stage, line = trained
    with pytest.raises(SystemExit) as stop:
        stage.main([line[0], str(tmp_path / "none"), *line[2:]])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ") and not any(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        stage.main([*line, "--resume"])
    assert "--resume" in capsys.readouterr().err
