"""Chat: what streamer, terminal and browser show is what the decoder wrote."""

import io

import pytest
from conftest import REPLY, Writer, frame, settled

import d1_full as d1


def settings(**changes):
    return settled(task="chat", **changes)


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


@pytest.mark.parametrize("stop", ["", ". One"])
def test_replies_give_a_streamer_drafts_of_each_block_then_exactly_the_reply(tiny, stop):
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


def test_replies_give_the_prompt_to_a_streamer_that_skips_it(tiny):
    tok, shown = tiny[1], Recorder(skip_prompt=True)
    list(d1.replies(Writer(tok), tok, [[5, 6, 7]], settings(block_length=8), None, shown))
    assert shown.log[0] == ("put", [5, 6, 7])


def test_replies_are_printed_by_transformers_own_streamer(tiny, capsys):
    from transformers import TextDiffusionStreamer

    tok = tiny[1]
    shown = TextDiffusionStreamer(tok, skip_special_tokens=True)
    list(d1.replies(Writer(tok), tok, [[5, 6, 7]], settings(block_length=8), None, shown))
    printed = capsys.readouterr().out
    left = [part.rpartition("\033[J")[2] for part in printed.split("\0337")]  # what no draft's removal takes back
    assert "".join(left) == REPLY + "\n" and "\033[33mHe" in printed


def test_render_marks_masks_fresh_and_edited_tokens(tiny):
    tok = tiny[1]
    ids = [5, 6, *tok.encode("abcd"), tok.mask_token_id, tok.mask_token_id, *tok.encode("xy")]
    shown = d1.render(frame(ids, new=(4, 5), edited=(8,)), 2, tok, 8)
    assert shown.plain == "abcd░░xy"
    styles = {shown.plain[s.start : s.end]: str(s.style) for s in shown.spans}
    assert styles == {"cd": "bold green", "░░": "dim", "x": "magenta underline"}


def test_render_leaves_out_what_follows_the_end_once_no_mask_stands_before_it(tiny):
    tok = tiny[1]
    a, b, mask, eos = *tok.encode("ab"), tok.mask_token_id, tok.eos_token_id
    shown = [d1.render(frame(ids), 0, tok, 4).plain for ids in ([a, mask, eos, b], [a, b, eos, mask], [a, b, mask, b])]
    assert shown == ["a░b", "ab", "ab░b"]
    assert d1.render(frame([a, b, a, b, mask, mask, mask, mask]), 0, tok, 4).plain == "abab"  # one block alone is begun


def test_render_keeps_the_blanks_of_words_between_runs():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[MASK]", "[SEP]", "hello", "world", "##ly", "again"]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]", eos_token="[SEP]", unk_token="[UNK]")
    shown = d1.render(frame([2, 3, 4, 5, 1, 6], new=(2,), edited=(3,)), 1, tok, 5)
    assert shown.plain == "hello worldly░ again"


def test_replies_recorded_as_text_frames(tiny):
    tok = tiny[1]
    steps = d1.replies(Writer(tok, "Hi Ada.", length=16), tok, [[5, 6]], settings(block_length=4, max_length=16), None)
    record = [(d1.render(f, 2, tok, 4).plain, texts[0]) for texts, f in steps]
    assert record == [("Hi░░", "Hi"), ("Hi A", "Hi A"), ("Hi Ada░░", "Hi Ada"), ("Hi Ada.", "Hi Ada."),
                      ("Hi Ada.", "Hi Ada.")]


def test_chat_remembers_and_forgets(talk):
    out, _, chats = talk(["one", "", "two", "/reset", "three"], system="Be kind.")
    assert out.count(REPLY) == 3
    said = [[(m["role"], m["content"]) for m in chat] for chat in chats]
    first = [("system", "Be kind."), ("user", "one")]
    assert said == [first, [*first, ("assistant", REPLY), ("user", "two")], [first[0], ("user", "three")]]


def test_chat_command_moves_its_slider_and_a_wrong_one_moves_nothing(talk):
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


def test_chat_refuses_blocks_over_half_the_context(talk, tiny):
    out, shown, _ = talk(["/length 64", "/block 64"], Writer(tiny[1], context=100))
    assert "over half of the model's context, 100 tokens" in out and "block 32" in shown[2]


def test_chat_sliders_reach_the_decoder(talk, tiny):
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


def test_chat_reply_ended_by_ctrl_c_is_kept(talk, tiny):
    out, _, chats = talk(["one", "two"], Writer(tiny[1], fail_at=4))
    assert [m["content"] for m in chats[1]] == ["one", REPLY[:6], "two"] and out.count(REPLY) == 1
    assert out.splitlines()[0] == REPLY[:6]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, "/quit"])
def test_chat_ends_at_its_prompt(talk, end):
    _, shown, chats = talk(["one", end, "two"])
    assert len(chats) == 1 and len(shown) == 2


def test_chat_over_the_context_forgets_its_oldest_turns_and_says_so_once(talk, tiny):
    model = Writer(tiny[1], context=128)
    out, _, chats = talk(["one " * 10, "two " * 10, "three " * 3, "four"], model, system="S")
    assert out.count("is forgotten") == 1 and out.count(REPLY) == 4 and model.longest <= 128
    assert [m["content"][:4] for m in chats[-1]] == ["S", "thre", "Hell", "four"]
    out, *_ = talk(["word " * 100], model)  # longer than the context by itself: its beginning is not seen
    assert "is forgotten" in out and model.longest == 128


def test_show_reply_in_a_terminal_shows_the_masks_and_then_the_reply(tiny, monkeypatch, capsys):
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


def test_chat_by_pipe_writes_nothing(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/steps 4\n"))
    assert d1.main(["--task", "chat", "--model", str(untrained), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("] > ") == 3 and "trained" not in out and not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert d1.main(["--task", "chat", "--threads", "1"]) == 0
    assert "untrained" in capsys.readouterr().out


@pytest.mark.parametrize("flags,word", [
    ("--task sudoku --web", "--web needs --task chat"), ("--task chat --web", "pip install gradio"),
    ("--task chat --max_length 33", "--max_length"), ("--task chat --resume", "--resume"),
])
def test_chat_flags_that_are_wrong_are_one_line(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(d1.importlib.util, "find_spec", lambda name: None)
    assert d1.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_web_reply_shows_masks_and_then_the_reply(tiny):
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


def test_serve_makes_the_page(tiny, monkeypatch):
    gradio = pytest.importorskip("gradio")
    launched = {}
    monkeypatch.setattr(gradio.ChatInterface, "launch", lambda self, **how: launched.update(how, page=self))
    d1.serve(Writer(tiny[1]), tiny[1], settings())
    assert launched["server_name"] == "127.0.0.1" and not launched["share"] and not launched["page"].analytics_enabled
    values = [c.value for c in launched["page"].additional_inputs]
    assert values == [0, 32, 32, 0.0, False, "low_confidence", "", ""]
    assert list(launched["page"].fn("hello", [], *values))[-1] == REPLY
