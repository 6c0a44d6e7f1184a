//! CPython's generator and the positions drawn with it.

use grail_protocol::challenge::{key, positions, positions_from_key};
use grail_protocol::constants::CHALLENGE_K;
use grail_protocol::hash::token_hash;
use grail_protocol::ids::TokenId;
use grail_protocol::json::{Object, Value, parse};
use grail_protocol::python_random::PythonRandom;
use grail_protocol::randomness::clean_hex;
use num_bigint::{BigInt, BigUint};
use serde::Deserialize;

/// The generator of one case, made as its `kind` says.
fn generator(case: &Object) -> PythonRandom {
    let seed = case.get("seed").and_then(Value::as_str).unwrap();
    let equivalent = case.get("equivalent_int").map(|text| text.as_str().unwrap().parse::<BigUint>().unwrap());
    match case.get("kind").and_then(Value::as_str) {
        Some("int") => {
            assert_eq!(equivalent, None);
            if let Ok(small) = seed.parse() {
                let mut other = PythonRandom::from_u64(small);
                assert_eq!(other.getrandbits(64), PythonRandom::from_int(&seed.parse().unwrap()).getrandbits(64));
            }
            PythonRandom::from_int(&seed.parse().unwrap())
        }
        Some("bytes") => {
            let seed = hex::decode(seed).unwrap();
            assert_eq!(Some(PythonRandom::integer_of_bytes(&seed)), equivalent);
            let mut by_int = PythonRandom::from_int(&BigInt::from(equivalent.unwrap()));
            assert_eq!(by_int.getrandbits(64), PythonRandom::from_bytes(&seed).getrandbits(64));
            PythonRandom::from_bytes(&seed)
        }
        Some("str") => {
            assert_eq!(equivalent, None);
            PythonRandom::from_str(seed)
        }
        other => panic!("unknown kind of seed {other:?}"),
    }
}

fn repeat<T: Into<Value>>(count: usize, mut call: impl FnMut() -> T) -> Value {
    Value::Array((0..count).map(|_| call().into()).collect())
}

fn float_text(number: f64) -> Value {
    let mut text = String::new();
    grail_protocol::json::push_float(&mut text, number);
    text.into()
}

fn indices(drawn: Option<Vec<usize>>) -> Value {
    Value::Array(drawn.unwrap().into_iter().map(|index| Value::Int(i64::try_from(index).unwrap())).collect())
}

fn texts<T: AsRef<str>>(drawn: Vec<T>) -> Value {
    Value::Array(drawn.iter().map(|text| Value::from(text.as_ref())).collect())
}

/// Makes the calls that `name` stands for, as often as `expected` has results.
fn traced(random: &mut PythonRandom, name: &str, expected: &Value) -> Value {
    const LETTERS: [&str; 5] = ["a", "b", "c", "d", "e"];
    let count = expected.as_array().map_or(0, <[Value]>::len);
    match name {
        "getrandbits32" => repeat(count, || i64::try_from(random.getrandbits(32)).unwrap()),
        "random" => repeat(count, || float_text(random.random())),
        "randint_4_15" => repeat(count, || random.randint(4, 15).unwrap()),
        "randrange_1000" => repeat(count, || random.randrange(0, 1_000, 1).unwrap()),
        "randrange_3_50_7" => repeat(count, || random.randrange(3, 50, 7).unwrap()),
        "choice_abcde" => repeat(count, || *random.choice(&LETTERS).unwrap()),
        "sample_range10_3" => indices(random.sample_indices(10, 3)),
        "sample_range100_5" => indices(random.sample_indices(100, 5)),
        "sample_range321_32" => indices(random.sample_indices(321, 32)),
        "sample_range8192_32" => indices(random.sample_indices(8_192, 32)),
        "sample_list40_4" => {
            let groups: Vec<String> = (0..40).map(|group| format!("g{group}")).collect();
            texts(random.sample(&groups, 4).unwrap())
        }
        "shuffle_50" => {
            let mut numbers: Vec<usize> = (0..50).collect();
            random.shuffle(&mut numbers);
            indices(Some(numbers))
        }
        "uniform_-1_1" => repeat(count, || float_text(random.uniform(-1.0, 1.0))),
        "gauss_0_1" => repeat(count, || float_text(random.gauss(0.0, 1.0))),
        "choices_012_k5" => {
            let drawn = random.choices(&[0_usize, 1, 2], 5).unwrap();
            indices(Some(drawn.into_iter().copied().collect()))
        }
        "getrandbits" => {
            let mut results = Object::default();
            for (bits, _) in expected.as_object().unwrap().iter() {
                let wide = bits.as_str().unwrap().parse().unwrap();
                let mut narrow = random.clone();
                let drawn = random.getrandbits_big(wide);
                if wide <= 64 {
                    assert_eq!(BigUint::from(narrow.getrandbits(wide)), drawn);
                }
                results.insert(bits.clone(), BigInt::from(drawn));
            }
            results.into()
        }
        other => panic!("no calls are known for {other}"),
    }
}

#[test]
fn cpython_random() {
    const FILE: &str = "protocol/cpython_random.json";
    // Read with our own parser: serde_json would round the 100-bit numbers.
    let file = parse(&String::from_utf8(grail_golden::bytes(FILE)).unwrap()).unwrap();
    let names = |object: &Object| object.iter().map(|(key, _)| format!("{key:?}")).collect::<Vec<_>>();
    assert_eq!(names(file.as_object().unwrap()), ["\"python\"", "\"order\"", "\"cases\""]);
    assert!(file.get("python").and_then(Value::as_str).unwrap().starts_with("3.12"));
    assert_eq!(
        file.get("order").and_then(Value::as_str),
        Some("calls are made in the order of the keys on one generator")
    );
    let cases = file.get("cases").and_then(Value::as_array).unwrap();
    let mut ran = 0;
    for case in cases {
        let case = case.as_object().unwrap();
        for name in names(case) {
            assert!(["\"kind\"", "\"seed\"", "\"equivalent_int\"", "\"trace\""].contains(&name.as_str()), "{name}");
        }
        let mut random = generator(case);
        for (name, expected) in case.get("trace").and_then(Value::as_object).unwrap().iter() {
            let name = name.as_str().unwrap();
            assert_eq!(&traced(&mut random, name, expected), expected, "{name} of seed {:?}", case.get("seed"));
        }
        ran += 1;
    }
    grail_golden::ran(FILE, ran, cases.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChallengeFile {
    cases: Vec<ChallengeCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChallengeCase {
    randomness: String,
    start: usize,
    end: usize,
    k: usize,
    indices: Vec<usize>,
    material: Option<String>,
    tokens: Option<Vec<u32>>,
    tokens_formula: Option<String>,
}

impl ChallengeCase {
    fn tokens(&self) -> Vec<TokenId> {
        match (&self.tokens, self.tokens_formula.as_deref()) {
            (Some(tokens), None) => tokens.iter().copied().map(TokenId).collect(),
            (None, Some("(i*7919+13) % 152000 for i in 0..end-1")) => {
                (0..self.end).map(|index| TokenId(u32::try_from((index * 7_919 + 13) % 152_000).unwrap())).collect()
            }
            other => panic!("unknown source of tokens {other:?}"),
        }
    }
}

#[test]
fn challenge_positions() {
    const FILE: &str = "protocol/challenge_indices.json";
    let file: ChallengeFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        let tokens = case.tokens();
        let randomness = clean_hex(&case.randomness).unwrap();
        let material = key(&token_hash(&tokens), &randomness);
        assert!(case.material.as_ref().is_none_or(|expected| *expected == hex::encode(material)));
        assert_eq!(positions_from_key(&material, case.start..case.end, case.k), case.indices);
        if case.k == CHALLENGE_K {
            assert_eq!(positions(&tokens, &randomness, case.start, case.end), case.indices);
        }
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len());
}
