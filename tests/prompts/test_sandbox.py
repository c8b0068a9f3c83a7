"""A hostile template can do nothing but render, and not for ever; these are the attacks of the trade."""

import json
import os
import time
from pathlib import Path

import pytest

from megatron_xmtf.errors import TemplateError
from megatron_xmtf.prompts import RenderLimits, RenderReport, parse_templates, render_rows
from megatron_xmtf.prompts.rendering.sandbox import RenderWorker
from megatron_xmtf.prompts.templates.template import Template
from megatron_xmtf.prompts.templates.variants import PosedTemplate

ROW = {"text": "word", "items": [1, 2], "label": 0}
LIMITS = RenderLimits(cpu_seconds=1, wall_seconds=30, memory_bytes=256 << 20, output_characters=100_000)


def hostile(jinja: str) -> Template:
    (template,) = parse_templates({"templates": [{"name": "evil", "input": jinja, "target": "t"}]}, source="T.yaml")
    return template


@pytest.mark.parametrize(
    "jinja",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__['os'] }}",
        "{{ range.__init__.__self__ }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ text | attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format(text) }}",
        "{{ '{x.__class__}'.format_map({'x': text}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(text) }}",
        "{{ ('{0.__class__}' | attr('format'))(text) }}",
        "{{ '{0.__class__}'.format.__wrapped__(text) }}",
        "{{ ['{0}'.format] | map('attr', '__globals__') | list }}",
        "{{ (text | map('upper')).gi_frame.f_globals }}",
        "{{ zip.__class__.__base__ }}",
        "{{ ('__cla' ~ 'ss__') and text['__cla' ~ 'ss__'] }}",
        "{{ _self_ and items.append(3) }}{{ items.append(3) }}",
        "{% for x in [text] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m.__class__.__init__.__globals__ }}",
        "{{ [text] | map(attribute='__class__') | list }}",
        "{{ dict(a=text) | dictsort | map(attribute='1.__class__') | list }}",
        "{{ [text] | groupby('__class__') }}",
    ],
)
def test_attribute_walks_are_refused(jinja: str) -> None:
    with pytest.raises(TemplateError, match=r"T\.yaml: template 'evil' .*(may not do|out of bounds)"):
        list(render_rows([ROW], [hostile(jinja)], seed=0, limits=LIMITS))


@pytest.mark.parametrize(
    ("jinja", "limit"),
    [
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "time limit of 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "time limit of 1 s"),
        ("{% set x = 7 ** (10 ** 8) %}{{ x }}", "time limit of 1 s"),
        ("{% set x = 'a' * 4000000000 %}{{ x | length }}", "memory limit of 256 MiB"),
        ("{{ 'a' * 4000000000 }}", "memory limit of 256 MiB"),
        ("{{ [0] * 400000000 }}", "memory limit of 256 MiB"),
        ("{{ text.center(200000) }}", "output limit"),
        ("{% for a in range(100000) %}{{ text }}{% endfor %}", "output limit"),
    ],
)
def test_exhaustion_is_stopped(jinja: str, limit: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        list(render_rows([ROW], [hostile(jinja)], seed=0, limits=LIMITS))
    assert limit in str(caught.value) and "'evil'" in str(caught.value)
    assert time.monotonic() - started < 30


def test_wall_clock_limit_holds_where_no_processor_time_passes() -> None:
    with RenderWorker(RenderLimits(wall_seconds=0.5)) as worker:
        worker.load([json.dumps(ROW)], ["r"])
        worker.render(PosedTemplate(hostile("{{ text }}")), seed=0)
        assert worker._process is not None
        os.kill(worker._process.pid, 19)  # SIGSTOP: the process lives and does nothing
        with pytest.raises(TemplateError, match=r"time limit of 0.5 s on the clock on rows r to r"):
            worker.render(PosedTemplate(hostile("{{ text }}")), seed=0)
        assert worker._process is None
        worker.render(PosedTemplate(hostile("{{ text }}")), seed=0)


def test_the_worker_can_open_nothing_even_outside_the_sandbox() -> None:
    """Stand-in for a sandbox that failed: code run in the worker's process after its door is closed."""
    import subprocess
    import sys

    code = (
        "import socket, os\n"
        "from megatron_xmtf.prompts.rendering.worker import lock_down\n"
        "lock_down({'memory_bytes': 1 << 30})\n"
        "for attempt in (lambda: open('/etc/passwd'), lambda: socket.socket(), lambda: os.pipe()):\n"
        "    try:\n"
        "        attempt()\n"
        "    except OSError as error:\n"
        "        print(error.errno)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["24", "24", "24"], result.stderr  # EMFILE


def test_the_worker_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_FOR_THE_TEST", "s3cret")
    with RenderWorker() as worker:
        worker.load([json.dumps(ROW)], ["r"])
        worker.render(PosedTemplate(hostile("{{ text }}")), seed=0)
        assert worker._process is not None
        assert b"s3cret" not in Path(f"/proc/{worker._process.pid}/environ").read_bytes()


def test_the_run_goes_on_without_the_hostile_template() -> None:
    loop = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    templates = parse_templates(
        {
            "templates": [
                {"name": "first", "input": "{{ text }}", "target": "t"},
                {"name": "loops", "input": loop, "target": "t"},
                {"name": "walks", "input": "{{ ''.__class__ }}", "target": "t"},
                {"name": "last", "input": "{{ text }}!", "target": "t"},
            ]
        }
    )
    report = RenderReport()
    rows = [{"text": f"row {number}"} for number in range(600)]
    records = list(render_rows(rows, templates, seed=0, report=report, on_error="skip", limits=LIMITS))
    assert [record.inputs for record in records[:4]] == ["row 0", "row 0!", "row 1", "row 1!"]
    assert len(records) == 1200
    assert "time limit" in (report.templates["loops"].rejected or "")
    assert "__class__" in (report.templates["walks"].rejected or "")
    assert report.templates["last"].rejected is None and report.templates["last"].rendered == 600
