from __future__ import annotations

import json
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from loadtest.ports import free_port
from vqserve.cli import main
from vqserve.evaluate.questions import Result, check_same, compare, draw, table
from vqserve.evaluate.served import Reply
from vqserve.format.errors import UsageError

TOKENS = '{"items": [{"right": true, "mode": "direct", "question": "", "expected": "", "tokens": [["a", null]]}]}'


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["eval", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_server_that_is_not_there_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    line = error_of(capsys, "arithmetic", f"http://127.0.0.1:{port}", "--per-language", "2")
    assert "cannot be reached" in line
    assert "vqserve serve" in line


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("text/html", "<html>Welcome</html>"),
        *(("application/json", text) for text in ("[]", "{}", '{"data": [', '{"data": [{}]}', '{"data": 3}')),
        *(("application/json", f'{{"data": [{{"id": "m"}}]{rest}}}') for rest in ("", ', "choices": []')),
        ("application/json", '{"data": [{"id": "m"}], "choices": [{"message": null}]}'),
    ],
)
def test_an_answer_that_is_not_of_the_api_is_said_to_be_none(
    kind: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign] # whoever gives up does not wait
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        line = error_of(capsys, "arithmetic", url, "--per-language", "1", "--mode", "direct")
        server.shutdown()
    assert f"{url}: its answer is not that of OpenAI's API" in line


def test_a_key_or_a_name_that_http_cannot_carry_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--model '\\udcff': expected" in error_of(capsys, "recall", "http://127.0.0.1:9", "--model", "\udcff")
    monkeypatch.setenv("VLLM_API_KEY", "clé")
    assert "VLLM_API_KEY: expected printable ASCII" in error_of(capsys, "recall", "http://127.0.0.1:9")


@pytest.mark.parametrize("content", [None, "not json", '{"items": 3', '{"scores": []}', "[]", "[" * 50_000, TOKENS])
def test_a_file_to_compare_with_has_to_be_a_run(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "before.json"
    if content is not None:
        path.write_text(content)
    line = error_of(capsys, "recall", "http://127.0.0.1:9", "--against", path)
    assert str(path) in line


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999", "http://127.0.0.1:x", "http://[::1"])
def test_a_url_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{url}: expected a URL such as http://127.0.0.1:8001" in error_of(capsys, "needle", url)


def test_results_go_to_a_folder_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "recall", "http://127.0.0.1:9", "--json", tmp_path / "no" / "out.json")
    assert "there is no folder" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 1}', ":2: expected"),
        ('{"prompt": "", "completion": "b"}', ":1: expected"),
        ('{"prompt": "a", "completion": 3}', ":1: expected"),
        ("x", ":1: expected"),
        ('{"prompt": "a", "completion": "\\ud83d"}', ":1: \\ud83d without its other half"),
    ],
)
def test_texts_have_to_be_prompts_and_completions(
    text: str, says: str, tmp_path: Path, random_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(text)
    assert says in error_of(capsys, "kl", random_parent, random_parent, "--text", path)


@pytest.mark.parametrize("template", [None, "{% if x %}", "{{ raise_exception('no') }}"])
def test_a_parent_whose_template_makes_no_prompt_is_said_so(
    template: str | None, tmp_path: Path, random_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(random_parent, odd)
    path = odd / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    line = error_of(capsys, "kl", random_parent, odd)
    assert f"{odd}: its chat template makes no prompt of a question" in line


def test_divergence_needs_two_checkpoints(
    tmp_path: Path, random_parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "config.json" in error_of(capsys, "kl", random_parent, tmp_path)


def test_divergence_writes_what_it_prints(
    tmp_path: Path, random_parent: Path, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = tmp_path / "text.jsonl", tmp_path / "kl.json"
    texts.write_text('{"prompt": "one two", "completion": " three four"}\n')
    arguments = ["kl", random_checkpoint, random_parent, "--text", texts, "--json", out]
    assert main(["eval", *map(str, arguments)]) == 0
    mean = json.loads(out.read_text())["kl"]["all"]["mean"]
    assert f"{mean:.5f}" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["arithmetic", "recall"])
def test_the_same_seed_asks_the_same_items(task: str) -> None:
    assert draw(task, 20, seed=3) == draw(task, 20, seed=3)
    assert draw(task, 20, seed=3) != draw(task, 20, seed=4)


def results(right: list[bool]) -> list[Result]:
    items = draw("arithmetic", 4, seed=0)
    return [Result(item, "direct", Reply("x", "", ok, 9), ok) for item, ok in zip(items, right, strict=True)]


def test_the_table_counts_by_language_and_kind() -> None:
    rows = {row["group"]: row for row in table(results([True] * 9 + [False] * 3))}
    assert rows["all"]["right"] == 0.75
    assert rows["zh"]["right"] == 0.25
    assert sum(row["items"] for group, row in rows.items() if group not in ("all", "ja", "en", "zh")) == 12


def test_two_runs_are_compared_item_by_item() -> None:
    now = [r.to_dict() for r in results([True] * 12)]
    before = [r.to_dict() for r in results([True] * 2 + [False] * 10)]
    paired = compare(now, before)
    assert (paired["gained"], paired["lost"]) == (10, 0)
    assert paired["p"] == pytest.approx(2 / 2**10)


def test_the_same_answers_are_counted_and_where_tokens_part_the_surer_run_is_told() -> None:
    def run(*tokens: tuple[tuple[str, float], ...]) -> list[dict[str, Any]]:
        items = draw("arithmetic", 2, seed=0)
        replies = [Reply("".join(token for token, _ in each), "", True, 9, each) for each in tokens]
        return [Result(item, "direct", reply, True).to_dict() for item, reply in zip(items, replies, strict=False)]

    same = (("1", 9.0), ("2", 8.0))
    now, before = run(same, (("1", 9.0), ("2", 0.1), ("5", 3.0))), run(same, (("1", 9.0), ("3", 0.25), ("7", 4.0)))
    assert compare(now, before)["same"] == 1
    assert compare(now, before)["parted"] == [0.25]
    assert compare(run(same), run((*same, ("3", 0.5))))["parted"] == [0.5]
    assert compare(run(same), run(same))["parted"] == []
    assert "parted" not in compare(run(same), run(()))


@pytest.mark.parametrize("change", [{"seed": 1}, {"per_language": 5}, {"task": "recall"}])
def test_a_run_on_other_items_is_refused(change: dict[str, Any]) -> None:
    before = [r.to_dict() for r in results([True] * 12)]
    same: dict[str, Any] = {"task": "arithmetic", "per_language": 4, "seed": 0}
    check_same(before, ["direct"], draw(**same))
    with pytest.raises(UsageError, match="--against"):
        check_same(before, ["direct"], draw(**same | change))
    with pytest.raises(UsageError, match="--against"):
        check_same(before, ["thinking"], draw(**same))
