//! Python's JSON text.

use grail_protocol::hash::sha256;
use grail_protocol::json::{Style, Text, Value, parse, push_escaped, push_float};
use serde::Deserialize;

const FILE: &str = "protocol/json_canonical.json";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    floats: Vec<FloatCase>,
    f32_widened: Vec<WidenedCase>,
    nonfinite: NonFinite,
    strings: Vec<StringCase>,
    objects: Vec<ObjectCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FloatCase {
    bits: String,
    text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WidenedCase {
    f32_bits: String,
    text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NonFinite {
    nan: String,
    inf: String,
    ninf: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StringCase {
    utf16: Vec<String>,
    ascii: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectCase {
    default: String,
    sorted_default: String,
    compact_sorted: String,
    sha256: String,
}

fn float_text(number: f64) -> String {
    let mut text = String::new();
    push_float(&mut text, number);
    text
}

fn assert_float(number: f64, text: &str) {
    assert_eq!(float_text(number), text);
    let read = parse(text).unwrap().as_f64().unwrap();
    assert!(read.to_bits() == number.to_bits() || (read.is_nan() && number.is_nan()), "{text}");
}

#[test]
fn canonical_json() {
    let file: File = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.floats {
        assert_float(f64::from_bits(u64::from_str_radix(&case.bits, 16).unwrap()), &case.text);
        ran += 1;
    }
    for case in &file.f32_widened {
        assert_float(f32::from_bits(u32::from_str_radix(&case.f32_bits, 16).unwrap()).into(), &case.text);
        ran += 1;
    }
    for (number, text) in [
        (f64::NAN, &file.nonfinite.nan),
        (f64::INFINITY, &file.nonfinite.inf),
        (f64::NEG_INFINITY, &file.nonfinite.ninf),
    ] {
        assert_float(number, text);
        ran += 1;
    }
    for case in &file.strings {
        let units: Vec<u16> = case.utf16.iter().map(|unit| u16::from_str_radix(unit, 16).unwrap()).collect();
        let text = Text::from_utf16(&units);
        if let Some(unicode) = text.as_str() {
            let mut escaped = String::new();
            push_escaped(&mut escaped, unicode);
            assert_eq!(escaped, case.ascii);
        }
        let value = Value::String(text);
        assert_eq!(value.to_json(Style::Default), case.ascii);
        assert_eq!(parse(&case.ascii).unwrap(), value);
        ran += 1;
    }
    for case in &file.objects {
        for text in [&case.default, &case.sorted_default, &case.compact_sorted] {
            let value = parse(text).unwrap();
            assert_eq!(value.to_json(Style::Sorted), case.sorted_default);
            let compact = value.to_json(Style::CompactSorted);
            assert_eq!(compact, case.compact_sorted);
            assert_eq!(hex::encode(sha256(compact.as_bytes())), case.sha256);
        }
        assert_eq!(parse(&case.default).unwrap().to_json(Style::Default), case.default);
        ran += 1;
    }
    let in_file = file.floats.len() + file.f32_widened.len() + 3 + file.strings.len() + file.objects.len();
    grail_golden::ran(FILE, ran, in_file);
}
