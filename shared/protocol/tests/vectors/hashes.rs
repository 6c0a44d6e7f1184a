//! PRF, token hash, completion digest, commitments.

use grail_protocol::binding::{commitments_hash, compact_commitments, parse_commitments, spaced_commitments};
use grail_protocol::hash::{
    Digest, completion_digest, completion_digest_of_ints, sha256, token_hash, token_hash_of, wrap_token,
};
use grail_protocol::ids::TokenId;
use grail_protocol::json::{Style, parse};
use grail_protocol::prf::{MAX_OUTPUT_BYTES, prf};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PrfFile {
    cases: Vec<PrfCase>,
    large: LargePrf,
    errors: Vec<PrfError>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PrfCase {
    label: String,
    parts: Vec<String>,
    out_bytes: usize,
    output: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LargePrf {
    label: String,
    parts: Vec<String>,
    out_bytes: usize,
    sha256: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PrfError {
    out_bytes: i64,
    error: bool,
}

fn prf_of(label: &str, parts: &[String], out_bytes: usize) -> Vec<u8> {
    let parts: Vec<Vec<u8>> = parts.iter().map(|part| hex::decode(part).unwrap()).collect();
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    prf(&hex::decode(label).unwrap(), &parts, out_bytes).unwrap()
}

#[test]
fn prf_outputs() {
    const FILE: &str = "protocol/prf.json";
    let file: PrfFile = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        assert_eq!(hex::encode(prf_of(&case.label, &case.parts, case.out_bytes)), case.output, "{:?}", case.parts);
        ran += 1;
    }
    let large = prf_of(&file.large.label, &file.large.parts, file.large.out_bytes);
    assert_eq!(large.len(), MAX_OUTPUT_BYTES);
    assert_eq!(hex::encode(sha256(&large)), file.large.sha256);
    ran += 1;
    for case in &file.errors {
        // A negative length is refused by the type already.
        let is_refused = usize::try_from(case.out_bytes).map_or(true, |bytes| prf(b"sketch", &[], bytes).is_err());
        assert_eq!(is_refused, case.error, "{}", case.out_bytes);
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len() + 1 + file.errors.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases<T> {
    cases: Vec<T>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenHashCase {
    tokens: Vec<i64>,
    sha256: String,
}

/// The ids, if all of them are ids.
fn token_ids(tokens: &[i64]) -> Option<Vec<TokenId>> {
    tokens.iter().map(|token| u32::try_from(*token).ok().map(TokenId)).collect()
}

#[test]
fn token_hashes() {
    const FILE: &str = "protocol/token_hash.json";
    let file: Cases<TokenHashCase> = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        let wrapped = token_hash_of(case.tokens.iter().map(|token| wrap_token(*token)));
        assert_eq!(hex::encode(wrapped), case.sha256);
        if let Some(tokens) = token_ids(&case.tokens) {
            assert_eq!(hex::encode(token_hash(&tokens)), case.sha256);
        }
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompletionDigestCase {
    tokens: Vec<i64>,
    prompt_length: Option<i64>,
    digest: Option<String>,
}

#[test]
fn completion_digests() {
    const FILE: &str = "protocol/completion_digest.json";
    let file: Cases<CompletionDigestCase> = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        let text = |digest: Option<Digest>| digest.map(hex::encode);
        assert_eq!(text(completion_digest_of_ints(&case.tokens, case.prompt_length)), case.digest);
        let tokens = token_ids(&case.tokens).unwrap();
        let prompt_length = usize::try_from(case.prompt_length.unwrap_or(0)).unwrap();
        assert_eq!(text(completion_digest(&tokens, prompt_length)), case.digest);
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commitment {
    pub sketch: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CommitmentsCase {
    commitments: Vec<Commitment>,
    compact: Option<String>,
    compact_sha256: String,
    spaced: Option<String>,
    spaced_sha256: String,
}

#[test]
fn commitment_texts() {
    const FILE: &str = "protocol/commitments.json";
    let file: Cases<CommitmentsCase> = grail_golden::json(FILE);
    let mut ran = 0;
    for case in &file.cases {
        let sketches: Vec<u32> = case.commitments.iter().map(|commitment| commitment.sketch).collect();
        let (compact, spaced) = (compact_commitments(&sketches), spaced_commitments(&sketches));
        for (ours, theirs, digest) in
            [(&compact, &case.compact, &case.compact_sha256), (&spaced, &case.spaced, &case.spaced_sha256)]
        {
            assert!(theirs.as_ref().is_none_or(|theirs| ours == theirs), "{ours}");
            assert_eq!(&hex::encode(sha256(ours.as_bytes())), digest);
            assert_eq!(parse_commitments(ours).as_ref(), Some(&sketches));
        }
        assert_eq!(hex::encode(commitments_hash(&sketches)), case.compact_sha256);
        let parsed = parse(&spaced).unwrap();
        assert_eq!(parsed.to_json(Style::CompactSorted), compact);
        assert_eq!(parsed.to_json(Style::Sorted), spaced);
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.cases.len());
}
