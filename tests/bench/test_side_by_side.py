"""Model folders side by side."""

from __future__ import annotations

import json

from qingyu.bench.side_by_side import main


def test_each_model_has_a_row_and_the_first_is_the_measure(tiny_model, tiny_int8, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("今天天气真好\n外面阳光明媚\n股票大跌\n", encoding="utf-8")
    assert (
        main([str(tiny_model), str(tiny_int8), "--texts", str(texts), "--rounds", "1", "--count", "2"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["model"] for row in rows] == [str(tiny_model), str(tiny_int8)]
    assert rows[0]["times_the_first"] == 1.0
    assert all(row["texts"] == 2 and row["tokens_per_second"] > row["texts_per_second"] > 0 for row in rows)
