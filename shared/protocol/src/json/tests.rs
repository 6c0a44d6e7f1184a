use num_bigint::BigInt;
use proptest::prelude::*;

use super::*;

fn error_of(text: &str) -> ParseErrorKind {
    parse(text).expect_err(text).kind
}

#[test]
fn values_that_python_reads() {
    let cases = [
        (" \t\r\n null ", Value::Null),
        ("true", Value::Bool(true)),
        ("-0", Value::Int(0)),
        ("-9223372036854775808", Value::Int(i64::MIN)),
        ("9223372036854775808", Value::BigInt(BigInt::from(1_u64 << 63))),
        ("1e5", Value::Float(1e5)),
        ("1E+2", Value::Float(100.0)),
        ("0.5e-1", Value::Float(0.05)),
        ("1e400", Value::Float(f64::INFINITY)),
        ("-1e400", Value::Float(f64::NEG_INFINITY)),
        ("1e-400", Value::Float(0.0)),
        ("-Infinity", Value::Float(f64::NEG_INFINITY)),
        ("[ ]", Value::Array(Vec::new())),
        ("{ }", Object::default().into()),
        ("\"\u{7F}\u{2028}\\/\\u00e9\"", Value::from("\u{7F}\u{2028}/é")),
    ];
    for (text, value) in cases {
        assert_eq!(parse(text).unwrap(), value, "{text}");
    }
    assert!(parse("NaN").unwrap().as_f64().unwrap().is_nan());
    assert_eq!(parse("-0.0").unwrap().to_json(Style::Default), "-0.0");
}

#[test]
fn texts_that_python_refuses() {
    use ParseErrorKind::*;
    let cases = [
        ("", ExpectedValue),
        ("-", ExpectedValue),
        ("+1", ExpectedValue),
        (".5", ExpectedValue),
        ("nul", ExpectedValue),
        ("\u{FEFF}1", ExpectedValue),
        ("\u{A0}1", ExpectedValue),
        ("[1,]", ExpectedValue),
        ("[", ExpectedValue),
        ("01", ExtraData),
        ("1.", ExtraData),
        ("1e", ExtraData),
        ("1.e5", ExtraData),
        ("1 2", ExtraData),
        ("-NaN", ExpectedValue),
        ("[1 2]", ExpectedComma),
        ("[1}", ExpectedComma),
        ("{\"a\":1 \"b\":2}", ExpectedComma),
        ("{\"a\":1,}", ExpectedKey),
        ("{1:2}", ExpectedKey),
        ("{\"a\" 1}", ExpectedColon),
        ("\"abc", UnterminatedString),
        ("\"a\nb\"", ControlCharacter),
        ("\"\\x\"", InvalidEscape),
        ("\"\\é\"", InvalidEscape),
        ("\"\\u12\"", InvalidEscape),
        ("\"\\u00g0\"", InvalidEscape),
        ("\"\\u+123\"", InvalidEscape),
        ("\"\\ud83d\\u12\"", InvalidEscape),
        ("\"\\", InvalidEscape),
    ];
    for (text, kind) in cases {
        assert_eq!(error_of(text), kind, "{text}");
    }
    let error = parse("[1, 2, x]").unwrap_err();
    assert_eq!(error.to_string(), "a value is expected at byte 7");
}

#[test]
fn the_last_value_of_a_repeated_key_stands_at_its_first_place() {
    let text = "{\"a\": 1, \"b\": 2, \"a\": 3}";
    assert_eq!(parse(text).unwrap().to_json(Style::Default), "{\"a\": 3, \"b\": 2}");
    // Above the limit of the linear search the same must hold.
    let many: String = (0..60).map(|index| format!("\"{}\": {index}, ", index % 40)).collect();
    let value = parse(&format!("{{{many}\"0\": -1}}")).unwrap();
    let object = value.as_object().unwrap();
    assert_eq!(object.len(), 40);
    let (first, zero) = object.iter().next().unwrap();
    assert_eq!((first.as_str(), zero), (Some("0"), &Value::Int(-1)));
    assert_eq!(object.get("19"), Some(&Value::Int(59)));
    assert_eq!(object.get("20"), Some(&Value::Int(20)));
}

#[test]
fn surrogates_join_only_in_the_right_order() {
    let units = |text: &str| match parse(text).unwrap() {
        Value::String(text) => text.code_points().collect::<Vec<_>>(),
        other => panic!("{other:?} is no string"),
    };
    assert_eq!(units("\"\\ud83d\\ude00\""), [0x1_F600]);
    assert_eq!(units("\"\\ude00\\ud83d\""), [0xDE00, 0xD83D]);
    assert_eq!(units("\"\\ud83d\\ud83d\\ude00\""), [0xD83D, 0x1_F600]);
    assert_eq!(units("\"\\ud83d\\u0041\""), [0xD83D, 0x41]);
    assert_eq!(units("\"\\ud83d\\n\""), [0xD83D, 0x0A]);
    assert_eq!(units("\"\\ud83dx\""), [0xD83D, 0x78]);
    assert_eq!(parse("\"\\ud83dx\"").unwrap().to_json(Style::Default), "\"\\ud83dx\"");
}

#[test]
fn depth_is_bounded_and_costs_no_stack() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let value = parse(&nested(MAX_DEPTH)).unwrap();
    assert_eq!(value.to_json(Style::Compact), nested(MAX_DEPTH));
    assert_eq!(error_of(&nested(MAX_DEPTH + 1)), ParseErrorKind::TooDeep);
    assert_eq!(error_of(&"[".repeat(3_000_000)), ParseErrorKind::TooDeep);
    assert_eq!(error_of(&"{\"a\":".repeat(1_000_000)), ParseErrorKind::TooDeep);
}

#[test]
fn integers_have_the_length_limit_of_python() {
    let longest = "9".repeat(MAX_INTEGER_DIGITS);
    assert_eq!(parse(&longest).unwrap().to_json(Style::Default), longest);
    assert!(parse(&format!("-{longest}")).is_ok());
    assert_eq!(error_of(&format!("{longest}9")), ParseErrorKind::IntegerTooLong);
    assert!(parse(&format!("{longest}9.0")).is_ok(), "a float has no such limit");
}

#[test]
fn large_and_small_integers_have_one_form_each() {
    assert_eq!(Value::from(BigInt::from(7)), Value::Int(7));
    let large: BigInt = "123456789012345678901234567890".parse().unwrap();
    assert_eq!(Value::from(large.clone()), Value::BigInt(large.clone()));
    assert_eq!(parse("123456789012345678901234567890").unwrap().to_bigint(), Some(large));
}

fn text() -> impl Strategy<Value = Text> {
    prop_oneof![
        "[ -~]{0,6}".prop_map(Text::from),
        any::<String>().prop_map(Text::from),
        proptest::collection::vec(
            prop_oneof![any::<u16>(), 0xD800_u16..0xE000, Just(0x22), Just(0x5C), 0_u16..0x20],
            0..6
        )
        .prop_map(|units| Text::from_utf16(&units)),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        any::<i128>().prop_map(|integer| Value::from(BigInt::from(integer) << 40)),
        any::<u64>()
            .prop_map(f64::from_bits)
            .prop_filter("NaN equals nothing", |float| !float.is_nan())
            .prop_map(Value::Float),
        any::<f32>()
            .prop_filter("NaN equals nothing", |float| !float.is_nan())
            .prop_map(|float| Value::Float(float.into())),
        text().prop_map(Value::String),
    ];
    scalar.prop_recursive(5, 60, 8, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..8).prop_map(Value::Array),
            proptest::collection::vec((text(), inner), 0..24).prop_map(|pairs| Object::from_pairs(pairs).into()),
        ]
    })
}

/// The value with the members of every object in order of their keys.
fn with_sorted_keys(value: &Value) -> Value {
    match value {
        Value::Array(elements) => Value::Array(elements.iter().map(with_sorted_keys).collect()),
        Value::Object(object) => {
            let mut pairs: Vec<_> = object.iter().map(|(key, value)| (key.clone(), with_sorted_keys(value))).collect();
            pairs.sort_by(|(left, _), (right, _)| left.code_points().cmp(right.code_points()));
            Object::from_pairs(pairs).into()
        }
        other => other.clone(),
    }
}

fn bracket_depth(value: &Value) -> usize {
    match value {
        Value::Array(elements) => 1 + elements.iter().map(bracket_depth).max().unwrap_or(0),
        Value::Object(object) => 1 + object.iter().map(|(_, value)| bracket_depth(value)).max().unwrap_or(0),
        _ => 0,
    }
}

proptest! {
    #[test]
    fn what_is_written_reads_back(value in value()) {
        let sorted = with_sorted_keys(&value);
        for (style, expected) in [
            (Style::Default, &value),
            (Style::Compact, &value),
            (Style::Sorted, &sorted),
            (Style::CompactSorted, &sorted),
        ] {
            let text = value.to_json(style);
            prop_assert!(text.is_ascii());
            let read = parse(&text).unwrap();
            prop_assert_eq!(&read, expected);
            prop_assert_eq!(read.to_json(style), text);
        }
    }

    #[test]
    fn floats_keep_their_bits(bits in any::<u64>()) {
        let float = f64::from_bits(bits);
        let mut text = String::new();
        push_float(&mut text, float);
        let read = parse(&text).unwrap().as_f64().unwrap();
        prop_assert!(read.to_bits() == bits || (read.is_nan() && float.is_nan()), "{}", text);
    }

    #[test]
    fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(value) = parse(&String::from_utf8_lossy(&bytes)) {
            prop_assert!(bracket_depth(&value) <= MAX_DEPTH);
        }
    }

    #[test]
    fn no_almost_json_makes_the_parser_panic(
        pieces in proptest::collection::vec(proptest::sample::select(vec![
            "{", "}", "[", "]", ",", ":", "\"", "\"a\"", "\\", "\\u", "\\ud83d", "\\ude00", "d8", "0", "1", "-", ".", "e", "E+",
            "NaN", "Infinity", "null", "true", "é", "\u{1F600}", " ", "\n", "\u{1}",
        ]), 0..40)
    ) {
        let text = pieces.concat();
        match parse(&text) {
            Ok(value) => {
                let written = value.to_json(Style::Default);
                prop_assert_eq!(parse(&written).unwrap().to_json(Style::Default), written);
            }
            Err(error) => prop_assert!(error.offset <= text.len()),
        }
    }
}
