"""``vlft push``: the card, what is uploaded, and what the hub may answer; without a network."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import GOLDEN, SIGLIP, make_rows, only_siglip, write_jsonl

import vlft
from vlft.errors import CheckpointError, ConfigError, UsageError, VlftError
from vlft.sharing import push
from vlft.sharing.card import MARK

RECORD = "What is number 0?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with --eval-metric, whose paths name this machine: the card must hide all of them."""
    home = tmp_path_factory.mktemp("machine")
    rows = make_rows(10)
    config = vlft.SftConfig(
        model=str(SIGLIP.folder), image_root=GOLDEN / "images", output_dir=home / "output",
        dataset=(str(write_jsonl(home / "my train.jsonl", rows[:7])),),
        val_dataset=(str(write_jsonl(home / "val.jsonl", rows[7:])),),
        batch_size=2, max_steps=2, save_steps=1, learning_rate=1e-2, lora_rank=4,
        show_sample=False, eval_metric="cer",
    )  # fmt: skip
    return vlft.sft(config).run


@pytest.fixture(scope="module")
def merged(run):
    config = vlft.MergeLoraConfig(ckpt_dir=run / "checkpoint-2", format="transformers")
    return vlft.merge_lora(config).folder


class Hub:
    """What vlft calls of HfApi."""

    def __init__(self, *, exists: bool = False) -> None:
        self.exists, self.made, self.files = exists, [], {}

    def repo_exists(self, _repo):
        return self.exists

    def create_repo(self, repo, **options):
        self.made.append((repo, options))

    def create_commit(self, repo, operations, *, commit_message):
        for one in operations:
            content = one.path_or_fileobj
            content = content if isinstance(content, bytes) else Path(content).read_bytes()
            self.files[one.path_in_repo] = content
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")

    def model_info(self, _repo):
        fields = {"license": "other", "license_name": "deepseek", "tags": ["x"]}
        return SimpleNamespace(card_data=SimpleNamespace(to_dict=lambda: fields))


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(push, "_api", lambda: made)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    return made


def header(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def share(folder, repo=None, **options):
    return vlft.push(vlft.PushConfig(folder=folder, repo=repo, **options))


@only_siglip
class TestCard:
    def test_of_an_adapter(self, run):
        """Of a run its best checkpoint is meant; nothing goes over a network."""
        found = share(run)
        assert found.address == ""
        assert found.card == (run / "best").resolve() / "README.md"
        text = found.card.read_text("utf-8")
        assert header(text) == {
            "library_name": "peft", "pipeline_tag": "image-text-to-text",
            "tags": ["vlft", "lora", "deepseek"],
        }  # fmt: skip
        digests = json.loads((run / "provenance.json").read_text())["data"]
        for path, digest in digests.items():
            assert f"{digest}  {Path(path).name}\n" in text
        assert "--dataset 'my train.jsonl'" in text
        assert "--lora-rank 4" in text
        assert "--model deepseek-vl-siglip" in text
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        step = int(found.card.parent.name.removeprefix("checkpoint-"))
        scores = {row["step"]: row for row in rows if "val_loss" in row}
        for name, key in (
            ("validation loss, nats per token", "val_loss"),
            ("cer of answers", "val_score"),
        ):
            assert f"| {name} | {scores[0][key]:.4f} | {scores[step][key]:.4f} |" in text

    def test_no_text_of_records_and_no_folders(self, run, merged, hub):
        """Nor in any other small file."""
        for folder in (run / "checkpoint-2", merged):
            share(folder, "me/one")
            for name, content in hub.files.items():
                if name.endswith((".md", ".json")) and not name.startswith("tokenizer"):
                    text = content.decode()
                    assert RECORD not in text
                    assert "It is 1." not in text
                    found = re.findall(r"(?:/(?:tmp|home|root|work|usr|var))/[^\s\"]*", text)
                    assert not found, name
            assert str(run.parent) not in hub.files["README.md"].decode()

    def test_of_a_model(self, run, merged):
        text = share(merged).card.read_text("utf-8")
        assert header(text)["library_name"] == "transformers"
        assert "vlft infer --model OWNER/NAME" in text
        assert "After 2 steps:" in text

    def test_of_a_model_elsewhere(self, run, merged, tmp_path):
        """The run that is named must have the adapter that was merged into it."""
        copy = shutil.copytree(merged, tmp_path / "elsewhere", ignore=lambda *_: ["README.md"])
        assert "## Training" not in share(copy).card.read_text("utf-8")
        text = share(copy, run=run).card.read_text("utf-8")
        assert "After 2 steps:" in text
        other = shutil.copytree(run, tmp_path / "other", symlinks=True)
        shutil.rmtree(other / "checkpoint-2")
        with pytest.raises(CheckpointError, match=r"its adapter is of no checkpoint of .*other"):
            share(copy, run=other)

    def test_of_a_base_on_the_hub(self, run, hub, tmp_path):
        """Its id, and the licence that its own card states."""
        copy = tmp_path / "adapter"
        copy.mkdir()
        for path in (run / "checkpoint-1").iterdir():
            if path.is_file():
                (copy / path.name).write_bytes(path.read_bytes())
        fields = json.loads((copy / "run_config.json").read_text())
        fields["model"] = "deepseek-ai/deepseek-vl-1.3b-chat"
        (copy / "run_config.json").write_text(json.dumps(fields))
        share(copy, "me/one")
        found = header(hub.files["README.md"].decode())
        assert found["base_model"] == "deepseek-ai/deepseek-vl-1.3b-chat"
        assert found["base_model_relation"] == "adapter"
        assert (found["license"], found["license_name"]) == ("other", "deepseek")
        stated = json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"]
        assert stated == "deepseek-ai/deepseek-vl-1.3b-chat"
        assert json.loads(hub.files["run_config.json"])["model"] == stated

    def test_the_licence_of_a_base_in_a_folder(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("---\nlicense: mit\ntags: [a]\n---\n# It\n")
        assert push.front_matter(readme) == {"license": "mit"}
        for odd in ("", "---\n- a\n---\n", "---\n: [\n---\n", "# no header\n---\na: b\n---\n"):
            readme.write_text(odd)
            assert push.front_matter(readme) == {}

    def test_a_card_of_the_users_own_stays(self, run, hub, capfd):
        path = run / "checkpoint-1" / "README.md"
        path.write_text("# My own words\n")
        share(run / "checkpoint-1", "me/one")
        assert hub.files["README.md"] == b"# My own words\n"
        assert "leaves as it is" in capfd.readouterr().err
        path.write_text(f"{MARK}\nold\n")
        share(run / "checkpoint-1")
        assert "## Training" in path.read_text()


@only_siglip
class TestUpload:
    def test_an_adapter(self, run, hub):
        found = share(run / "checkpoint-2", "me/one")
        assert found.address == "https://hub/me/one/commit/1"
        assert hub.made == [("me/one", {"private": True, "exist_ok": True})]
        assert sorted(hub.files) == [
            "README.md", "adapter_config.json", "adapter_model.safetensors", "run_config.json",
        ]  # fmt: skip
        weights = (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
        assert hub.files["adapter_model.safetensors"] == weights

    def test_what_is_uploaded_answers(self, run, hub, tmp_path):
        """As somebody who has downloaded it would use it."""
        share(run / "checkpoint-2", "me/one")
        copy = tmp_path / "downloaded"
        copy.mkdir()
        for name, content in hub.files.items():
            (copy / name).write_bytes(content)
        data = write_jsonl(tmp_path / "q.jsonl", [{"query": "Hello."}])
        asked = {"dataset": (str(data),), "max_new_tokens": 4, "show_samples": 0}
        replies = [
            vlft.infer(
                vlft.InferConfig(ckpt_dir=folder, output=tmp_path / f"{n}.jsonl", **base, **asked)
            ).rows[0]["response"]
            for n, (folder, base) in enumerate(
                [(copy, {"model": str(SIGLIP.folder)}), (run / "checkpoint-2", {})]
            )
        ]
        assert replies[0] == replies[1]

    def test_a_model_without_what_is_of_the_run(self, merged, hub):
        (merged / "notes.jsonl").write_text("{}\n")
        (merged / ".hidden.json").write_text("{}\n")
        share(merged, "me/one", public=True)
        assert hub.made[0][1]["private"] is False
        files = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
        assert files <= hub.files.keys()
        assert not {"notes.jsonl", ".hidden.json"} & hub.files.keys()

    def test_a_repository_that_exists(self, run, hub):
        hub.exists = True
        with pytest.raises(ConfigError, match=r"me/one: exists on the hub(.|\n)*--overwrite"):
            share(run / "checkpoint-2", "me/one")
        assert not hub.files
        share(run / "checkpoint-2", "me/one", overwrite=True)
        assert hub.files


@only_siglip
class TestRefused:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"folder": None}, "vlft push: found no folder"),
            ({"folder": "x", "repo": "one"}, "REPO: found 'one'"),
            ({"folder": "nowhere"}, "nowhere: no such folder"),
        ],
    )
    def test_settings(self, given, said):
        with pytest.raises(UsageError, match=re.escape(said)):
            vlft.push(vlft.PushConfig(**given))

    def test_a_folder_without_weights(self, hub, tmp_path):
        (tmp_path / "config.json").write_text((SIGLIP.folder / "config.json").read_text())
        with pytest.raises(CheckpointError, match="holds no weights"):
            share(tmp_path, "me/one")

    def test_links(self, hub, tmp_path):
        """They could lead out of a folder that a stranger has made."""
        (tmp_path / "secret.txt").write_text("secret")
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text((SIGLIP.folder / "config.json").read_text())
        (folder / "model.safetensors").symlink_to(tmp_path / "secret.txt")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: a link"):
            share(folder, "me/one")
        assert not hub.files

    def test_no_token(self, run, monkeypatch):
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(ConfigError, match=r"found no token of the hub\n hint: log in with: hf"):
            share(run / "checkpoint-2", "me/one")

    @pytest.fixture
    def endpoint(self, monkeypatch):
        """The real client, which talks to a server of this process that refuses all."""

        class Refusing(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_error(401, "Invalid credentials")

            do_POST = do_HEAD = do_GET  # noqa: N815 (the names of the server)

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        monkeypatch.delenv("HTTP_PROXY", raising=False)
        monkeypatch.delenv("http_proxy", raising=False)

        def stop():
            if thread.is_alive():
                server.shutdown()
                thread.join()
                server.server_close()

        yield stop
        stop()

    def test_a_wrong_token(self, run, endpoint):
        with pytest.raises(VlftError, match=r"the hub refuses it(.|\n)*hf auth login") as found:
            share(run / "checkpoint-2", "me/one")
        assert "hf_wrong" not in str(found.value)
        assert (run / "checkpoint-2" / "README.md").is_file()

    def test_no_network(self, run, endpoint):
        endpoint()
        with pytest.raises(VlftError, match=r"me/one: the hub does not answer(.|\n)*HF_ENDPOINT"):
            share(run / "checkpoint-2", "me/one")
        assert (run / "checkpoint-2" / "README.md").is_file()
