"""What a run says at its start of what is slower than it could be."""

import json

import torch

from megasora.config import Config
from megasora.run_log.run_log import RunLog

INFO = {"parameters": 7, "layout": {"data": 1}, "clips": 3, "tokens_per_step": 5}


def test_notices_are_printed_at_the_start_and_kept_in_run_json(tmp_path, capsys):
    config = Config()
    config.run.dir, config.wandb.mode = str(tmp_path), "disabled"
    with RunLog(config, 0, 0) as log:
        log.write_run_info({**INFO, "notices": ["attention is slow; install more"]}, torch.device("cpu"), 1)
        log.write_run_info(INFO, torch.device("cpu"), 1)  # of a task without notices
    assert capsys.readouterr().err.count("attention is slow; install more\n") == 1
    assert "notices" not in json.loads((tmp_path / "run.json").read_text())
    with RunLog(config, 1, 0) as log:  # another rank
        log.write_run_info({**INFO, "notices": ["attention is slow"]}, torch.device("cpu"), 1)
    assert capsys.readouterr() == ("", "")
