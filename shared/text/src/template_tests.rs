//! What templates may use, on small sources.

use proptest::prelude::*;

use super::*;

fn render(source: &str) -> Result<String, RenderError> {
    let template = ChatTemplate::with_budget(source, &SpecialTokens::default(), 20_000).expect("the template parses");
    template
        .render(&[Message::system("S"), Message::user("  a  b\u{1c}")], RenderOptions { enable_thinking: Some(true) })
}

#[track_caller]
fn assert_renders(source: &str, expected: &str) {
    assert_eq!(render(source).unwrap_or_else(|error| panic!("{source}: {error}")), expected, "{source}");
}

#[test]
fn variables_are_those_of_transformers() {
    assert_renders("{{ tools is none }}{{ tools is defined }}{{ documents is none }}", "TrueTrueTrue");
    assert_renders("{{ add_generation_prompt }}{{ enable_thinking }}{{ bos_token is defined }}", "TrueTrueFalse");
    assert_renders(
        "{{ messages[-1]['role'] }}{{ messages[0].content }}{{ messages[1].tool_calls is defined }}",
        "userSFalse",
    );
    assert_renders("{{ messages[0] }}", "{'role': 'system', 'content': 'S'}");
}

#[test]
fn white_space_control_is_that_of_transformers() {
    assert_renders("a\n  {% if true %}\nb\n  {% endif %}\nc\n\n", "a\nb\nc\n");
    assert_renders("a\r\nb\rc", "a\nb\nc");
    assert_renders("{{ 'x\r\ny' }}", "x\ny");
}

#[test]
fn python_methods() {
    let content = "{% set t = messages[1].content %}";
    assert_renders(
        &format!("{content}[{{{{ t.strip() }}}}][{{{{ t|trim }}}}][{{{{ t.lstrip(' a') }}}}]"),
        "[a  b][a  b][b\u{1c}]",
    );
    assert_renders(&format!("{content}{{{{ t.split() }}}}{{{{ t.split(' ', 1) }}}}"), "['a', 'b']['', ' a  b\\x1c']");
    assert_renders("{{ 'a,b,c'.split(sep=',', maxsplit=1) }}{{ 'a,b,c'.rsplit(',', 1) }}", "['a', 'b,c']['a,b', 'c']");
    assert_renders("{{ ' a b c '.split(None, 1) }}{{ ' a b c '.rsplit(none, 1) }}", "['a', 'b c '][' a b', 'c']");
    assert_renders("{{ 'a\\u2028b\\nc'.splitlines() | length }}{{ 'a\\nb'.splitlines(true)[0] | length }}", "32");
    assert_renders("{{ 'xay'.removeprefix('x').removesuffix('y') }}", "a");
    assert_renders(
        "{{ 'k=v=w'.partition('=')[2] }}{{ 'k=v=w'.rpartition('=')[0] }}{{ 'kv'.rpartition('=')[2] }}",
        "v=wk=vkv",
    );
    assert_renders("{{ '\\x1c '.isspace() }}{{ ''.isspace() }}", "TrueFalse");
    assert_renders("{{ 'abc'.startswith(('x', 'a')) }}{{ {'k': 1}.get('q', 2) }}", "True2");
    for source in ["{{ 'a'.split('') }}", "{{ 'a'.partition('') }}", "{{ 'a'.nothing() }}"] {
        assert!(matches!(render(source), Err(RenderError::Template { .. })), "{source}");
    }
}

#[test]
fn statements_and_tests() {
    assert_renders(
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "023",
    );
    assert_renders(
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index %}{{ m.role[0] }}{% endfor %}{{ ns.n }}",
        "us3",
    );
    assert_renders("{% macro f(x, y='z') %}{{ x ~ y }}{% endmacro %}{{ f('a') }}", "az");
    assert_renders("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}", "1False");
    assert_renders(
        "{{ 'x' is string }}{{ {} is mapping }}{{ [] is iterable }}{{ none is none }}{{ false is false }}",
        "TrueTrueTrueTrueTrue",
    );
    assert_renders("{{ missing }}|{{ 'yes' if missing else 'no' }}", "|no");
    assert_renders("{{ 1.0 }} {{ true }} {{ none }} {{ [1, 'a', none] }}", "1.0 True None [1, 'a', None]");
}

#[test]
fn tojson_is_json_dumps() {
    let cases = [
        ("{'b': [1, 2.5, true, none], 'a': '<é&\\'>'}|tojson", r#"{"b": [1, 2.5, true, null], "a": "<é&'>"}"#),
        ("'é\\u0007😀\\x7f'|tojson(ensure_ascii=true)", r#""\u00e9\u0007\ud83d\ude00\u007f""#),
        ("{'b': 1, 'a': [2]}|tojson(indent=2, sort_keys=true)", "{\n  \"a\": [\n    2\n  ],\n  \"b\": 1\n}"),
        ("{'b': 1, 'a': []}|tojson(separators=(',', ':'))", r#"{"b":1,"a":[]}"#),
        ("[1, 2]|tojson(false, '\\t', ('; ', '='))", "[\n\t1; \n\t2\n]"),
        ("{1: 'x', none: {}}|tojson", r#"{"1": "x", "null": {}}"#),
        ("1e20|tojson", "1e+20"),
    ];
    for (expression, expected) in cases {
        assert_renders(&format!("{{{{ {expression} }}}}"), expected);
    }
    for expression in [
        "missing|tojson",
        "1|tojson(indent=[])",
        "1|tojson(wrong=1)",
        "1|tojson(separators=',')",
        "1|tojson(indent=999)",
    ] {
        assert!(render(&format!("{{{{ {expression} }}}}")).is_err(), "{expression}");
    }
}

#[test]
fn date_and_refusal() {
    let year: i32 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
    assert!(year >= 2024, "{year}");
    let refused = render("{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}");
    assert!(matches!(refused, Err(RenderError::Refused { message }) if message == "No system!"));
}

#[test]
fn work_without_end_is_stopped() {
    let loops = "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}x{% endfor %}{% endfor %}{% endfor %}";
    let doubling =
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}";
    let huge = "{{ 'x' * 99999999 }}";
    for source in [loops, doubling, huge] {
        assert!(matches!(render(source), Err(RenderError::OutOfBudget { budget: 20_000 })), "{source}");
    }
    let endless = render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}");
    assert!(matches!(endless, Err(RenderError::Template { .. } | RenderError::OutOfBudget { .. })));
}

/// Pieces of templates, put together at random.
fn source() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("{{ "),
        Just(" }}"),
        Just("{% "),
        Just(" %}"),
        Just("{%- "),
        Just(" -%}"),
        Just("{# "),
        Just(" #}"),
        Just("if "),
        Just("endif"),
        Just("for m in messages"),
        Just("endfor"),
        Just("set x = "),
        Just("messages"),
        Just("[::-1]"),
        Just("[-1]"),
        Just(".role"),
        Just("['content']"),
        Just(".split('a')"),
        Just(".strip()"),
        Just("|tojson"),
        Just("(indent=2)"),
        Just("raw"),
        Just("endraw"),
        Just("generation"),
        Just("endgeneration"),
        Just("'é"),
        Just("\""),
        Just("("),
        Just(")"),
        Just("namespace()"),
        Just("macro f(x)"),
        Just("endmacro"),
        Just("f("),
        Just("not "),
        Just(" in "),
        Just("loop.index0"),
        Just(" * 99999"),
        Just(" ~ "),
        Just("\n"),
        Just("strftime_now('%Y')"),
        Just("raise_exception('x')"),
        Just("range(99999)"),
        Just("1e400"),
        Just("**"),
    ];
    prop::collection::vec(piece, 0..30).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn no_source_panics(source in prop_oneof![source(), any::<String>()]) {
        if let Ok(template) = ChatTemplate::with_budget(&source, &SpecialTokens::default(), 2_000) {
            let rendered = template.render(&[Message::user("x")], RenderOptions::default());
            prop_assert!(rendered.map_or(true, |text| text.len() <= 2_000 * 64));
        }
    }

    #[test]
    fn plain_text_is_kept(text in "[^{}#%\r\n]{0,60}") {
        let template = ChatTemplate::new(&text, &SpecialTokens::default()).unwrap();
        prop_assert_eq!(template.render(&[], RenderOptions::default()).unwrap(), text);
    }

    #[test]
    fn content_is_never_interpreted(content in any::<String>()) {
        let template = ChatTemplate::new("{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}", &SpecialTokens::default()).unwrap();
        let text = template.render(&[Message::user(content.clone())], RenderOptions::default()).unwrap();
        prop_assert_eq!(text, format!("<{content}>"));
    }
}
