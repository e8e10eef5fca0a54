"""The examples run as their first lines say, with the model in the package, and answer right."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from qingyu.__main__ import main

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
needs_search = pytest.mark.skipif(find_spec("usearch") is None, reason="needs the extra search")


def run(name: str, *arguments: str, given: str = "") -> list[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_search
def test_the_faq_bot_answers_what_it_knows_and_says_what_it_does_not():
    questions = {
        "忘了密码登不上去怎么办": "忘记密码",
        "我的钱什么时候退回来": "申请退款",
        "东西几天能寄出来": "四十八小时",
        "今天的月亮真圆": "这个我还不会",
    }
    answers = run("faq_bot.py", *questions)
    for answer, part in zip(answers, questions.values(), strict=True):
        assert part in answer


def test_the_faq_bot_has_at_most_thirty_lines():
    assert len((EXAMPLES / "faq_bot.py").read_text(encoding="utf-8").splitlines()) <= 30


@needs_search
def test_documents_of_a_folder_are_found_with_their_line_and_only_changes_are_embedded(tmp_path):
    story = "公司成立于二零一零年，总部在杭州。\n" * 40
    (tmp_path / "company.md").write_text(
        story + "年假按工龄计算，满一年的员工有五天。\n" + story, encoding="utf-8"
    )
    (tmp_path / "refund.txt").write_text("买家可以在七天内申请退款。", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    first = run("document_search.py", str(tmp_path), "一年有几天年假")
    assert first[0] == "2 new, 0 changed, 0 deleted"
    place, _, text = first[1].partition(": ")
    assert place.startswith("company.md, line ")
    number = int(place.rpartition(" ")[2])
    assert 30 <= number <= 41
    assert "公司" in text or "年假" in text
    (tmp_path / "refund.txt").unlink()
    (tmp_path / "new.txt").write_text("食堂在三楼，中午十一点半开饭。", encoding="utf-8")
    second = run("document_search.py", str(tmp_path), "几点吃午饭")
    assert second[0] == "1 new, 0 changed, 1 deleted"
    assert second[1].startswith("new.txt, line 1: 食堂在三楼")


def test_intents_are_routed_by_a_few_examples():
    wanted = {
        "帮我订一张去上海的高铁票": "订票",
        "后天会不会下雪": "天气",
        "来一首邓丽君的歌": "音乐",
        "六点半叫醒我": "闹钟",
    }
    found = dict(line.split("\t")[:2] for line in run("intent_routing.py", *wanted, "这个公司的股票大跌了"))
    assert found == {**wanted, "这个公司的股票大跌了": "其他"}


@needs_search
def test_a_lambda_function_answers_events_of_api_gateway_from_an_index(tmp_path):
    rows = [{"id": "a", "text": "在设置里修改登录密码"}, {"id": "b", "text": "四十八小时内发货"}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert main(["index", "build", str(tmp_path / "d.jsonl"), str(tmp_path / "kb")]) == 0
    program = f"""
import json, os, runpy
os.environ["QINGYU_INDEX"] = {str(tmp_path / "kb")!r}
handler = runpy.run_path({str(EXAMPLES / "lambda_search.py")!r})["handler"]
asked = [{{"q": "怎么改密码"}}, {{"q": "什么时候发货", "k": "1"}}, None]
asked += [{{"q": "发货", "k": wrong}} for wrong in ("0", "x")]
for given in asked:
    answer = handler({{"version": "2.0", "queryStringParameters": given}}, None)
    body = json.loads(answer["body"])
    print(answer["statusCode"], *[hit["id"] for hit in body.get("hits", [])])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["200 a b", "200 b", "400", "400", "400"], done.stderr
