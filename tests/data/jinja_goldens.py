"""Makes chat/jinja.json: small chat templates and what transformers renders of them. Made with transformers 5.23.0 and
Jinja2 3.1. A template that is refused there is left out.

    python jinja_goldens.py
"""

import json
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
# One a line. Known to differ and left out: numbers below 1e-4 or from 1e16 on within a printed list, `attr` of a
# method, the helpers `lipsum`, `cycler` and `joiner`.
TEMPLATES = r'''
{{ ' a ' | trim }}|
{{ 'xxaxx' | trim('x') }}
{{ 'xxaxx'.strip('x') }}
{{ ['a','b'] | join }}
{{ [{'n':'a'},{'n':'b'}] | join(', ', attribute='n') }}
{{ 'a\nb' | indent }}
{{ 'a\nb' | indent(2, true) }}
{{ 'a\n\nb' | indent(2, blank=true) }}
{{ 'a\nb' | indent(width=2, first=True) }}
{{ '' | default('x') }}|
{{ '' | default('x', true) }}
{{ none | default('x') }}
{{ undefined_thing | default('x') }}
{{ '' | d('x', boolean=true) }}
{{ [3,1,2] | sort }}
{{ [3,1,2] | sort(reverse=true) }}
{{ ['b','A','c'] | sort }}
{{ ['b','A','c'] | sort(case_sensitive=true) }}
{{ [{'n':2},{'n':1}] | sort(attribute='n') }}
{{ {'b':1,'a':2} | dictsort }}
{{ {'b':1,'a':2} | dictsort(by='value') }}
{{ {'b':1,'A':2} | dictsort(true) }}
{{ {'b':1,'a':2} | dictsort(reverse=true) }}
{{ [{'n':2},{'m':1}] | map(attribute='n', default='z') | list }}
{{ ['a','b'] | map('upper') | list }}
{{ [{'r':'u'},{'r':'a'}] | selectattr('r','equalto','u') | list }}
{{ [{'r':'u'},{'r':'a'}] | rejectattr('r','eq','u') | list }}
{{ [{'r':'u'},{'x':'a'}] | selectattr('r') | list }}
{{ [1,2,3,4] | select('odd') | list }}
{{ [1,2,3,4] | reject('divisibleby', 2) | list }}
{{ 2.567 | round(2) }}
{{ 2.567 | round(1, 'floor') }}
{{ 2.567 | round(1, 'ceil') }}
{{ 2.5 | round }}
{{ 3 | round }}
{{ 'x' | int }}
{{ 'x' | int(7) }}
{{ 'ff' | int(0, 16) }}
{{ '3.7' | int }}
{{ 'x' | float(1.5) }}
{{ 'aaa' | replace('a','b') }}
{{ 'aaa' | replace('a','b',1) }}
{{ 'aaa' | replace('a','b',count=2) }}
{{ 'aaa'.replace('a','b',1) }}
{{ 'hello world foo bar' | truncate(12) }}
{{ 'hello world foo bar' | truncate(12, true) }}
{{ 'hello world foo bar' | truncate(12, killwords=true, end='!') }}
{{ [1,2,3,4,5] | batch(2) | list }}
{{ [1,2,3,4,5] | batch(2, 'x') | list }}
{{ [1,2,3,4,5] | slice(2) | list }}
{{ [1,2,1] | unique | list }}
{{ ['a','A'] | unique | list }}
{{ ['a','A'] | unique(case_sensitive=true) | list }}
{{ 'hello wORLD' | title }}
{{ 'hello wORLD' | capitalize }}
{{ [{'g':1,'v':2},{'g':1,'v':3}] | groupby('g') | list }}
{{ 'a %s %d' | format('x', 3) }}
{{ '%05.2f' | format(3.14159) }}
{{ 'x' | center(5) }}|
{{ 'a b c' | wordcount }}
{{ '<a>' | escape }}
{{ '<a>' | e }}
{{ '<a>' }}
{{ 'a/b c' | urlencode }}
{{ [1,2,3] | sum }}
{{ [{'v':1},{'v':2}] | sum(attribute='v') }}
{{ [{'v':1},{'v':2}] | sum(attribute='v', start=10) }}
{{ [1,5,3] | max }}
{{ ['b','A'] | min }}
{{ [{'v':1},{'v':5}] | max(attribute='v') }}
{{ 'abc' | reverse }}
{{ [1,2] | reverse | list }}
{{ 'abc' | list }}
{{ 'abc' | first }}{{ 'abc' | last }}
{{ 'abc' | length }}
{{ {'a':1} | items | list }}
{{ {'a':1,'b':2} | list }}
{{ {'a': 1}.items() | list }}
{{ true }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ 0.1 + 0.2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 4 / 2 }} {{ 2 ** 3 }} {{ 2 ** -1 }}
{{ [1, 'a', none, true, 2.0, {'k': 'v'}] }}
{{ "it's" | string }} {{ ["it's"] }} {{ ['a"b'] }} {{ ['\n'] }} {{ ['é'] }}
{{ {'a': [1,2]} }}
{{ (1, 2) }} {{ (1,) }} {{ () }}
{{ 'a' ~ 1 ~ none ~ true }}
{{ 'abc'[1:] }} {{ 'abc'[::-1] }} {{ 'abc'[-1] }} {{ [1,2,3][:-1] }}
{{ 'a' in 'abc' }} {{ 'x' not in ['y'] }} {{ 'k' in {'k': 1} }}
{{ 'abc'.split('b') }} {{ 'a  b'.split() }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b,c'.rsplit(',', 1) }}
{{ 'a b'.partition(' ') }}
{{ 'Abc'.lower() }} {{ 'abc'.upper() }} {{ 'abc'.startswith('a') }} {{ 'abc'.endswith(('c','d')) }} {{ 'abc'.startswith(('x','a')) }}
{{ 'abc'.find('c') }} {{ 'abc'.index('b') }} {{ 'abab'.count('ab') }} {{ ' a'.lstrip() }} {{ 'a '.rstrip() }}|
{{ 'abc'.lstrip('a') }} {{ 'abc'.rstrip('c') }} {{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }}
{{ 'a\nb'.splitlines() }} {{ 'a\nb\n'.splitlines(true) }}
{{ 'x'.join(['a','b']) }} {{ '{} {}'.format('a', 1) }} {{ '{0}{x}'.format('a', x=2) }} {{ 'a'.zfill(3) }} {{ 'a'.ljust(3) }}|
{{ '5'.isdigit() }} {{ 'a'.isalpha() }} {{ 'A'.isupper() }} {{ ' '.isspace() }} {{ 'a b'.title() }} {{ 'ab'.capitalize() }} {{ 'aB'.swapcase() }}
{{ {'a':1}.get('a') }} {{ {'a':1}.get('b') }} {{ {'a':1}.get('b', 5) }} {{ {'a':1}.keys() | list }} {{ {'a':1}.values() | list }}
{{ [1,2].index(2) }} {{ [1,1].count(1) }}
{{ {'a': 1, 'b': none}['b'] is none }} {{ x is defined }} {{ 1 is number }} {{ 'a' is string }} {{ [] is iterable }} {{ {} is mapping }} {{ 'a' is iterable }} {{ [] is sequence }} {{ true is boolean }} {{ 1 is integer }} {{ 1.0 is float }} {{ 4 is divisibleby 2 }} {{ 'a' is sameas 'a' }} {{ true is true }} {{ none is not none }} {{ 1 is eq 1 }} {{ 'A' is upper }}
{{ range(3) | list }} {{ range(1, 7, 2) | list }}
{% set ns = namespace(x=0) %}{% for i in [1,2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}
{% for i in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}
{% for i in [1,2,3,4] %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for k, v in {'a':1,'b':2}.items() %}{{ k }}{{ v }}{% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %}
{% for i in [1,2,3] if i > 1 %}{{ loop.index }}{{ i }}{% endfor %}
{% for i in [1,2] recursive %}{{ i }}{% endfor %}
{% macro m(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=3) }}
{% macro m(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}
{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, x=2) }}
{% filter upper %}abc{% endfilter %}
{% set x %}abc{% endset %}{{ x }}
{% set x | upper %}abc{% endset %}{{ x }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% if 1 == 1.0 %}y{% endif %}{% if '1' == 1 %}n{% endif %}
{{ 'a' if false }}|
{{ 'a' if true else 'b' }}
{{ not none }} {{ not [] }} {{ [] or 'x' }} {{ 'a' and 'b' }} {{ 0 or none }}
{{ 1 < 2 < 3 }} {{ 'a' < 'b' }} {{ [1] == [1] }} {{ {'a':1} == {'a':1} }}
{{ [1] + [2] }} {{ 'a' * 3 }} {{ [1] * 2 }}
{{ '\x41' }} {{ '\u00e9' }} {{ '\t' }}|{{ '\\n' }}
{%- raw %} {{ x }} {% endraw %}
{# comment #}a
  {%- if true %} a {%- endif %} b
{% if true +%} a {% endif %}
   {% if true %}x{% endif %}
{{ [['a',1]] | tojson }} {{ 'é' | tojson }} {{ none | tojson }} {{ {'a': 1.0} | tojson(indent=2) }}
{{ [3,1] | tojson(indent=0) }}
{{ {'role': 'x'}.role }} {{ {'a-b': 1}['a-b'] }} {{ {'items': 5}['items'] }}
{{ {'content': 'x'}.content.strip().split('x')|length }}
{{ '%s' % 'a' }} {{ '%d-%s' % (1, 'b') }}
{{ 1_000 }} {{ 0x10 }} {{ 1.5e3 }}
{{ [1,2,3] | length > 2 }}
{{ 'a,b' | list | join('-') }}
{{ ['x'] | first | default('d') }} {{ [] | first | default('d') }} {{ [] | last is defined }}
{{ [1,2][5] is defined }} {{ [1,2][5] | default('oob') }}
{{ 'ABC' | lower | upper | lower }}
{{ 'a b' | replace(' ', '_') | upper }}
{{ 'abc' | pprint }} {{ {'b':1,'a':2} | pprint }}
{{ 'a' | wordwrap(1) }}
{{ 1234567 | filesizeformat }}
{{ '<b>x</b>' | striptags }}
{{ '<b>' | safe }}
{{ 'hello' | forceescape }}
{{ {'a': 1} | xmlattr }}
{{ 'x' is in ['x'] }} {{ 'abc' is test_missing }}
{{ 'x' | nofilter }}
{{ messages[0]['content'] }} {{ messages[-1].role }} {{ messages | length }} {{ messages[0] }}
{{ messages[0].get('name', 'n') }} {{ messages[0].name is defined }} {{ 'tool_calls' in messages[0] }} {{ messages[0].keys() | list }}
{{ tools }} {{ tools is none }} {{ tools is defined }} {{ documents is defined }} {{ add_generation_prompt }}
{{ bos_token }}{{ eos_token }} {{ pad_token is defined }}
{% set loop_messages = messages[1:] %}{{ loop_messages | length }}
{% for m in messages %}{{ loop.index0 % 2 == 0 }}{{ loop.cycle('a','b') }}{{ loop.changed(m.role) }}{{ loop.depth }}{% endfor %}
{% include 'x' %}
{% do [1].append(2) %}
{% set l = [1] %}{% set _ = l.append(2) %}{{ l }}
{% set d = {} %}{% set _ = d.update({'a': 1}) %}{{ d }}
{{ 10 | abs }} {{ -3 | abs }} {{ (-3) | abs }}
{{ 'a' | upper ~ 'b' }}
{{ 3.0 }} {{ 3.10 }} {{ 1/3 }} {{ 100000000000000000000 }} {{ 1e16 }} {{ 1e-5 }} {{ 1.5 | string }}
{{ 'Ünï' | title }} {{ "they're bill's" | title }} {{ "a-b c_d" | title }}
'''.strip("\n").split("\n") + ["{% if true -%}\n  a\n{%- endif %}", "{% if true %}\r\na\r\n{% endif %}\r\nb\rc\r\n"]

goldens = []
for template in TEMPLATES:
    try:
        text = _compile_jinja_template(template).render(
            messages=MESSAGES, tools=None, documents=None, add_generation_prompt=False, bos_token="<s>", eos_token="</s>")
    except Exception as error:
        print(f"left out: {template}: {error}")
        continue
    goldens.append([template, text])
lines = ",\n".join(json.dumps(golden, ensure_ascii=False) for golden in goldens)
(Path(__file__).parent / "chat" / "jinja.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
