"""Chat: what streamer, terminal, browser and pipeline show is what the decoder wrote."""

import ast
import copy
import io
import re
import types
from pathlib import Path

import pytest
import torch

import d1_full as d1

REPLY = "Hello Ada. One two."


class Writer(torch.nn.Module):
    """A model that is sure of one reply: the tokens on the left a little more than those on the right."""

    def __init__(self, tokenizer, text=REPLY, length=32, context=512, fail_at=None):
        super().__init__()
        ids = tokenizer.encode(text)
        self.target = torch.tensor(ids + [tokenizer.eos_token_id] * (length - len(ids)))
        self.config = types.SimpleNamespace(max_position_embeddings=context, vocab_size=len(tokenizer))
        self.device, self.calls, self.fail_at, self.longest = torch.device("cpu"), 0, fail_at, 0

    def forward(self, ids, attention_mask=None):
        self.calls, self.longest = self.calls + 1, max(self.longest, ids.shape[1])
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        logits = torch.zeros(*ids.shape, self.config.vocab_size)
        place = torch.arange(ids.shape[1])[-len(self.target) :]
        logits[:, place, self.target[-len(place) :]] = torch.linspace(8, 2, len(self.target))[-len(place) :]
        return types.SimpleNamespace(logits=logits)


def settings(**changes):
    return d1.settle({k: (v, "test") for k, v in {"task": "chat", **changes}.items()})[0]


def frame(ids, new=(), edited=(), block=0):
    ids = torch.tensor([ids])
    marks = [torch.zeros_like(ids, dtype=torch.bool) for _ in range(2)]
    for mark, places in zip(marks, (new, edited), strict=True):
        mark[0, list(places)] = True
    return d1.Frame(ids, marks[0], block, 0, torch.zeros(ids.shape), marks[1])


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self, skip_prompt=False):
        self.skip_prompt, self.log = skip_prompt, []

    def put(self, value):
        self.log.append(("put", value.tolist()))

    def put_draft(self, value):
        self.log.append(("draft", value.tolist()))

    def end(self):
        self.log.append(("end", []))


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    """The embedded model, untrained, as this script saves it."""
    folder = tmp_path_factory.mktemp("tiny")
    d1.export_model(*tiny, folder, {"preset": "tiny", "stages": []})
    return folder


@pytest.mark.parametrize("stop", ["", ". One"])
def test_a_streamer_gets_drafts_of_each_block_then_exactly_the_reply(tiny, stop):
    tok, shown = tiny[1], Recorder()
    model = Writer(tok)
    *_, (texts, last) = d1.replies(model, tok, [[5, 6, 7]], settings(block_length=8, stop=stop), None, shown)
    kinds = [kind for kind, _ in shown.log]
    put = [i for kind, ids in shown.log if kind == "put" for i in ids]
    reply = REPLY.partition(stop)[0] if stop else REPLY
    assert tok.decode(put) == reply == texts[0] and put == tok.encode(reply)
    assert kinds[:5] == ["draft"] * 4 + ["put"] and kinds[-1] == "end" and kinds.count("end") == 1
    drafts = [ids for kind, ids in shown.log if kind == "draft"]
    assert all(len(ids) == 8 for ids in drafts) and drafts[0].count(tok.mask_token_id) == 6
    assert drafts[3] == put[:8] and (last.ids != tok.mask_token_id).all()


def test_a_streamer_that_skips_the_prompt_is_given_it(tiny):
    tok, shown = tiny[1], Recorder(skip_prompt=True)
    list(d1.replies(Writer(tok), tok, [[5, 6, 7]], settings(block_length=8), None, shown))
    assert shown.log[0] == ("put", [5, 6, 7])


def test_transformers_own_streamer_prints_the_reply(tiny, capsys):
    from transformers import TextDiffusionStreamer

    tok = tiny[1]
    shown = TextDiffusionStreamer(tok, skip_special_tokens=True)
    list(d1.replies(Writer(tok), tok, [[5, 6, 7]], settings(block_length=8), None, shown))
    printed = capsys.readouterr().out
    left = [part.rpartition("\033[J")[2] for part in printed.split("\0337")]  # what no draft's removal takes back
    assert "".join(left) == REPLY + "\n" and "\033[33mHe" in printed


def test_masks_fresh_and_edited_tokens_are_marked(tiny):
    tok = tiny[1]
    ids = [5, 6, *tok.encode("abcd"), tok.mask_token_id, tok.mask_token_id, *tok.encode("xy")]
    shown = d1.render(frame(ids, new=(4, 5), edited=(8,)), 2, tok, 8)
    assert shown.plain == "abcd░░xy"
    styles = {shown.plain[s.start : s.end]: str(s.style) for s in shown.spans}
    assert styles == {"cd": "bold green", "░░": "dim", "x": "magenta underline"}


def test_what_follows_the_end_is_left_out_once_no_mask_stands_before_it(tiny):
    tok = tiny[1]
    a, b, mask, eos = *tok.encode("ab"), tok.mask_token_id, tok.eos_token_id
    shown = [d1.render(frame(ids), 0, tok, 4).plain for ids in ([a, mask, eos, b], [a, b, eos, mask], [a, b, mask, b])]
    assert shown == ["a░b", "ab", "ab░b"]
    assert d1.render(frame([a, b, a, b, mask, mask, mask, mask]), 0, tok, 4).plain == "abab"  # one block alone is begun


def test_words_keep_their_blanks_between_runs():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[MASK]", "[SEP]", "hello", "world", "##ly", "again"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]", eos_token="[SEP]", unk_token="[UNK]")
    shown = d1.render(frame([2, 3, 4, 5, 1, 6], new=(2,), edited=(3,)), 1, tok, 5)
    assert shown.plain == "hello worldly░ again"


def test_a_reply_recorded_as_text_frames(tiny):
    tok = tiny[1]
    steps = d1.replies(Writer(tok, "Hi Ada.", length=16), tok, [[5, 6]], settings(block_length=4, max_length=16), None)
    record = [(d1.render(f, 2, tok, 4).plain, texts[0]) for texts, f in steps]
    assert record == [("Hi░░", "Hi"), ("Hi A", "Hi A"), ("Hi Ada░░", "Hi Ada"), ("Hi Ada.", "Hi Ada."),
                      ("Hi Ada.", "Hi Ada.")]


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """talk(lines, model, **settings) -> (what was printed, the prompts, the chats that the model was asked)."""

    def run(lines, model=None, **changes):
        model, shown, chats, said = model or Writer(tiny[1]), [], [], iter(lines)
        encode = d1.encode_prompt

        def type_in(prompt):
            shown.append(prompt)
            line = next(said, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(d1, "open_model", lambda cfg, screen: (model, tiny[1]))
        monkeypatch.setattr(d1, "encode_prompt", lambda tok, chat: chats.append(list(chat)) or encode(tok, chat))
        monkeypatch.setattr("builtins.input", type_in)
        assert d1.chat(settings(**changes), d1.Screen()) is None
        monkeypatch.undo()
        untrained, _, out = capsys.readouterr().out.partition("\n")
        assert "untrained" in untrained
        return out, shown, chats

    return run


def test_a_chat_remembers_and_forgets(talk):
    out, _, chats = talk(["one", "", "two", "/reset", "three"], system="Be kind.")
    assert out.count(REPLY) == 3
    said = [[(m["role"], m["content"]) for m in chat] for chat in chats]
    first = [("system", "Be kind."), ("user", "one")]
    assert said == [first, [*first, ("assistant", REPLY), ("user", "two")], [first[0], ("user", "three")]]


def test_each_slash_command_moves_its_slider_and_a_wrong_one_moves_nothing(talk):
    good = ["/steps 4", "/length 64", "/block 64", "/temp 0.5", "/edits on", "/mode confidence", "/mode ancestral",
            "/system x", "/stop y", "/edits off", "/temp 0", "/stop"]
    out, shown, _ = talk(good)
    assert shown[0] == "[steps 16, block 32, length 32, temp 0, low_confidence, edits off] > "
    assert shown[9] == "[steps 4, block 64, length 64, temp 0.5, ancestral, edits on] > " and "commands" not in out
    for line, word in (("/steps many", "/steps takes N, not 'many'"), ("/steps -1", "--eval_steps"), ("/block 5", "5"),
                       ("/length 33", "--max_length 33 must be a positive multiple"), ("/temp nan", "--temperature"),
                       ("/edits maybe", "on|off"), ("/mode best", "random"), ("/", "/steps N"), ("/help", "/reset"),
                       ("/bogus 1", "commands: /steps N"), ("/block 512", "512")):
        out, shown, chats = talk([line])
        assert word in out and len(out.strip().splitlines()) == 1 and shown[0] == shown[1] and not chats, line


def test_blocks_over_half_the_context_are_refused(talk, tiny):
    out, shown, _ = talk(["/length 64", "/block 64"], Writer(tiny[1], context=100))
    assert "over half of the model's context, 100 tokens" in out and "block 32" in shown[2]


def test_the_sliders_reach_the_decoder(talk, tiny):
    model = Writer(tiny[1])
    talk(["/steps 3", "hello"], model)
    assert model.calls == 3
    out, *_ = talk(["/stop  two", "hello"])
    assert "Hello Ada. One" in out and "two" not in out
    calls = []
    for stop in ("", "/stop Ada"):  # nothing is written after the block that holds it
        talk([stop, "/block 8", "hello"], model := Writer(tiny[1], REPLY * 2, length=64), max_length=64)
        calls.append(model.calls)
    assert calls == [20, 8]


def test_ctrl_c_ends_the_reply_and_what_is_there_is_kept(talk, tiny):
    out, _, chats = talk(["one", "two"], Writer(tiny[1], fail_at=4))
    assert [m["content"] for m in chats[1]] == ["one", REPLY[:6], "two"] and out.count(REPLY) == 1
    assert out.splitlines()[0] == REPLY[:6]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, "/quit"])
def test_the_prompt_is_where_a_chat_ends(talk, end):
    _, shown, chats = talk(["one", end, "two"])
    assert len(chats) == 1 and len(shown) == 2


def test_a_chat_over_the_context_forgets_its_oldest_turns_and_says_so_once(talk, tiny):
    model = Writer(tiny[1], context=128)
    out, _, chats = talk(["one " * 10, "two " * 10, "three " * 3, "four"], model, system="S")
    assert out.count("is forgotten") == 1 and out.count(REPLY) == 4 and model.longest <= 128
    assert [m["content"][:4] for m in chats[-1]] == ["S", "thre", "Hell", "four"]
    out, *_ = talk(["word " * 100], model)  # longer than the context by itself: its beginning is not seen
    assert "is forgotten" in out and model.longest == 128


def test_a_terminal_shows_the_masks_and_then_the_reply(tiny, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    screen, tok = d1.Screen(), tiny[1]
    screen.live, cfg = True, settings(block_length=8)
    steps = d1.replies(Writer(tok), tok, [[5, 6]], cfg, None)
    monkeypatch.setattr("rich.live.Live.update", lambda self, view: shown.append(view.renderables))
    shown = []
    assert d1.show_reply(steps, 2, tok, cfg, screen) == REPLY
    assert shown[0][0].plain == "He░░░░░░" and shown[-1][0].plain == REPLY
    assert shown[0][1].plain.startswith("block 1/4 · step 1 · 2 tokens · ")
    assert f"· {len(tok.encode(REPLY))} tokens ·" in shown[-1][1].plain
    steps = d1.replies(Writer(tok, fail_at=2), tok, [[5, 6]], cfg, None)
    assert d1.show_reply(steps, 2, tok, cfg, screen) == "He" == shown[-1][0].plain  # Ctrl-C leaves no masks


def test_chat_by_pipe_writes_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/steps 4\n"))
    assert d1.main(["--task", "chat", "--model", str(checkpoint), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("] > ") == 3 and "trained" not in out and not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert d1.main(["--task", "chat", "--threads", "1"]) == 0
    assert "untrained" in capsys.readouterr().out


@pytest.mark.parametrize("flags,word", [
    ("--task sudoku --web", "--web needs --task chat"), ("--task chat --web", "pip install gradio"),
    ("--task chat --max_length 33", "--max_length"), ("--task chat --resume", "--resume"),
])
def test_wrong_flags_are_one_line(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(d1.importlib.util, "find_spec", lambda name: None)
    assert d1.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def pipe(checkpoint):
    import transformers

    from d1_full import TextDiffusionPipeline

    made = transformers.pipeline("text-diffusion", model=str(checkpoint), device="cpu")
    assert type(made) is TextDiffusionPipeline and not made.model.training
    return made


def decoded(model, tok, chat, **options):
    ids = torch.tensor([d1.encode_prompt(tok, chat)])
    out = d1.diffuse_decode(model.eval(), ids, mask_id=tok.mask_token_id, eos_id=tok.eos_token_id, stop_at_eos=True,
                            gen_length=32, **options)
    return d1.reply_texts(tok, out[:, ids.shape[1] :])[0]


def test_the_pipeline_writes_what_the_decoder_writes(pipe, tiny):
    chat = [{"role": "user", "content": "Who am I?"}]
    want = decoded(*tiny, chat)
    assert len(want) > 5 and pipe("Who am I?") == pipe(chat) == [{"generated_text": want}]
    options = dict(num_steps=4, block_length=8, max_length=32)
    assert pipe(chat, **options)[0]["generated_text"] == decoded(*tiny, chat, steps=4, block_length=8) != want
    draws = [pipe(chat, temperature=1.0, seed=s)[0]["generated_text"] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2] and want not in draws
    by_chance = decoded(*tiny, chat, remasking="ancestral", generator=[d1.keyed_generator(0, "pipeline", 0)])
    assert pipe(chat, use_confidence=False, seed=0) == [{"generated_text": by_chance}]
    assert pipe(chat, use_confidence=True) == [{"generated_text": want}]


def test_the_lines_of_the_readme_run(checkpoint, tmp_path, monkeypatch, capsys):
    readme = (Path(d1.__file__).parent / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from d1_full import TextDiffusionPipeline.*?)```", readme, re.S)
    assert lines.count("\n") == 3
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "sft").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    (said,) = ast.literal_eval(capsys.readouterr().out)
    assert list(said) == ["generated_text"] and isinstance(said["generated_text"], str)


def test_a_batch_equals_singles(pipe):
    texts = ["Who am I?", "Count.", "What is the opposite of hot, and who lives in the sea?"]
    singles = [pipe(text) for text in texts]
    assert len({s[0]["generated_text"] for s in singles}) > 1
    assert pipe(texts) == pipe(texts, batch_size=2) == singles


def test_a_tokenizer_without_a_template_gets_the_text_as_the_prompt(pipe, monkeypatch):
    ids, tok = [], copy.deepcopy(pipe.tokenizer)
    monkeypatch.setattr(pipe, "tokenizer", tok)
    tok.chat_template = None
    monkeypatch.setattr(d1, "replies", lambda model, tok, prompts, *rest: ids.extend(prompts) or iter([(["x"], None)]))
    assert pipe("abc") == [{"generated_text": "x"}] and ids == [tok.encode("abc")]
    tok.mask_token = None
    with pytest.raises(d1.UserError, match="lacks a mask"):
        pipe("abc")


def test_edits_and_the_stop_text_reach_the_decoder(pipe, tiny, monkeypatch):
    monkeypatch.setattr(pipe, "model", Writer(tiny[1], length=256))
    pipe.model.name_or_path = ""
    assert pipe("?", stop_token=". One") == [{"generated_text": "Hello Ada"}]
    seen = []
    monkeypatch.setattr(d1, "diffuse_steps", lambda *a, **k: seen.append(k) or iter([frame([5, 6])]))
    pipe("?", allow_edits=True), pipe("?")
    assert [k["edit_rate"] for k in seen] == [0.1, 0] and seen[0]["gen_length"] == 256


def test_the_pipeline_streams_one_prompt(pipe, capsys):
    reply = pipe("Who am I?", stream=True)[0]["generated_text"]
    printed = capsys.readouterr().out
    assert printed.endswith(reply + "\n") and "\033[33m" in printed
    with pytest.raises(d1.UserError, match="one prompt"):
        pipe(["a", "b"], stream=True)
    with pytest.raises(TypeError, match="unknown option top_k"):
        pipe("a", top_k=3)
    with pytest.raises(d1.UserError, match="max_length 33"):
        pipe("a", max_length=33)
    with pytest.raises(d1.UserError, match="two blocks are over"):
        pipe("a" * 2000)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-modernbert", "adapter"])
def test_the_pipeline_loads_what_this_script_saves(name, checkpoint, tmp_path):
    import transformers

    assert d1.TextDiffusionPipeline is d1.TextDiffusionPipeline
    lora = (4, 8, 0.0, "all") if name == "adapter" else None
    model, tok = d1.load_model(str(checkpoint) if lora else name, lora=lora, device="cpu")
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(0, 0.1)
    d1.export_model(model, tok, tmp_path, {"preset": "tiny", "stages": []})
    made = transformers.pipeline("text-diffusion", model=str(tmp_path), device="cpu")
    assert made("Hi")[0]["generated_text"] == decoded(model, tok, [{"role": "user", "content": "Hi"}])


def test_the_browser_gets_masks_and_then_the_reply(tiny):
    tok, told = tiny[1], []
    history = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": "Yes"}]
    sliders = [8, 8, 32, 0, False, "low_confidence", "Be kind.", ""]
    shown = list(d1.web_reply(Writer(tok), tok, settings(), told.append, "more", history, *sliders))
    assert shown[0] == "Hell░░░░" and shown[-1] == REPLY and not told
    sliders[2] = 30
    assert not list(d1.web_reply(Writer(tok), tok, settings(), told.append, "more", history, *sliders))
    sliders[2] = 32
    list(d1.web_reply(Writer(tok, context=40), tok, settings(), told.append, "more " * 9, history, *sliders))
    assert "--max_length 30 must be" in told[0] and "not seen" in told[1] and len(told) == 2


def test_the_browser_page_is_made(tiny, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched = {}
    monkeypatch.setattr(gradio.ChatInterface, "launch", lambda self, **how: launched.update(how, page=self))
    d1.serve(Writer(tiny[1]), tiny[1], settings())
    assert launched["server_name"] == "127.0.0.1" and not launched["share"] and not launched["page"].analytics_enabled
    values = [c.value for c in launched["page"].additional_inputs]
    assert values == [0, 32, 32, 0.0, False, "low_confidence", "", ""]
    assert list(launched["page"].fn("hello", [], *values))[-1] == REPLY
