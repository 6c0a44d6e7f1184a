//! Signatures and what the commit signature binds.

use grail_protocol::binding::{CommitBinding, commitments_hash};
use grail_protocol::constants::ACCEPTED_PROOF_VERSIONS;
use grail_protocol::hash::token_hash;
use grail_protocol::ids::{Hotkey, TokenId};
use grail_protocol::keys::{
    Keypair, SS58_FORMAT, Signature, decode_address, encode_address, verify, verify_with_public_key,
};
use grail_protocol::randomness::clean_hex;
use serde::Deserialize;

use crate::hashes::Commitment;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    how: String,
    mnemonic: Option<String>,
    public_key: String,
    ss58: String,
    crypto: String,
    ss58_format: u16,
}

impl Key {
    /// Makes the key pair as `how` says and checks everything that is written about it.
    fn checked(&self) -> Keypair {
        let keypair = match (self.how.split_once(' '), &self.mnemonic) {
            (Some(("uri", uri)), None) => Keypair::from_uri(uri).unwrap(),
            (Some(("mini-secret", seed)), None) => {
                let seed: [u8; 32] = clean_hex(seed).unwrap().try_into().unwrap();
                Keypair::from_seed(&seed)
            }
            (None, Some(phrase)) if self.how == "mnemonic" => Keypair::from_mnemonic(phrase).unwrap(),
            _ => panic!("unknown kind of key {}", self.how),
        };
        assert_eq!(self.crypto, "sr25519");
        assert_eq!(self.ss58_format, SS58_FORMAT);
        assert_eq!(hex::encode(keypair.public_key()), self.public_key);
        assert_eq!(keypair.hotkey().0, self.ss58);
        assert_eq!(encode_address(&keypair.public_key()).0, self.ss58);
        assert_eq!(decode_address(&self.ss58).unwrap(), keypair.public_key());
        keypair
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SignatureFile {
    keys: Vec<Key>,
    signer: usize,
    note: String,
    cases: Vec<SignatureCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(non_snake_case, reason = "named as in the file")]
struct SignatureCase {
    message: String,
    signature: String,
    valid: bool,
    tampered_signature: String,
    tampered_valid: bool,
    signature_over_Bytes_wrapped: String,
    wrapped_accepted_for_plain_message: bool,
    other_key_accepts: bool,
}

#[test]
fn signatures() {
    const FILE: &str = "protocol/signatures.json";
    let file: SignatureFile = grail_golden::json(FILE);
    assert!(!file.note.is_empty());
    let mut ran = 0;
    let keypairs: Vec<Keypair> = file.keys.iter().map(Key::checked).collect();
    ran += keypairs.len();
    let signer = &keypairs[file.signer];
    for case in &file.cases {
        let message = hex::decode(&case.message).unwrap();
        let accepts = |signature: &str| verify(signer.hotkey(), &message, &signature.parse().unwrap());
        assert_eq!(accepts(&case.signature), case.valid);
        assert_eq!(accepts(&case.tampered_signature), case.tampered_valid);
        assert_eq!(accepts(&case.signature_over_Bytes_wrapped), case.wrapped_accepted_for_plain_message);
        let signature: Signature = case.signature.parse().unwrap();
        for (index, other) in keypairs.iter().enumerate().filter(|(index, _)| *index != file.signer) {
            let accepted = verify_with_public_key(&other.public_key(), &message, &signature);
            assert_eq!(accepted, case.other_key_accepts, "key {index}");
        }
        let own = signer.sign(&message);
        assert!(verify(signer.hotkey(), &message, &own));
        ran += 1;
    }
    grail_golden::ran(FILE, ran, file.keys.len() + file.cases.len());
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BindingFile {
    signer: Key,
    cases: Vec<BindingCase>,
    commit_verify: Vec<CommitVerifyCase>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BindingCase {
    tokens: Vec<u32>,
    randomness: String,
    model_name: String,
    layer_index: i32,
    commitments: Vec<Commitment>,
    preimage: String,
    binding: String,
    signature: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CommitVerifyCase {
    valid: bool,
    proof_version: String,
    case: usize,
}

impl BindingCase {
    /// Checks pre-image and digest; returns whether `hotkey` signed the digest.
    fn is_signed_by(&self, hotkey: &Hotkey) -> bool {
        let tokens: Vec<TokenId> = self.tokens.iter().copied().map(TokenId).collect();
        let sketches: Vec<u32> = self.commitments.iter().map(|commitment| commitment.sketch).collect();
        let binding = CommitBinding {
            token_hash: &token_hash(&tokens),
            randomness: &clean_hex(&self.randomness).unwrap(),
            model_name: &self.model_name,
            layer_index: self.layer_index,
            commitments_hash: &commitments_hash(&sketches),
        };
        assert_eq!(hex::encode(binding.preimage()), self.preimage);
        assert_eq!(hex::encode(binding.digest()), self.binding);
        verify(hotkey, &binding.digest(), &self.signature.parse().unwrap())
    }
}

#[test]
fn bindings() {
    const FILE: &str = "protocol/binding.json";
    let file: BindingFile = grail_golden::json(FILE);
    let signer = file.signer.checked();
    let mut ran = 1;
    for case in &file.cases {
        assert!(case.is_signed_by(signer.hotkey()));
        ran += 1;
    }
    for verdict in &file.commit_verify {
        let is_signed = file.cases[verdict.case].is_signed_by(signer.hotkey());
        let has_version = ACCEPTED_PROOF_VERSIONS.contains(&verdict.proof_version.as_str());
        assert_eq!(is_signed && has_version, verdict.valid, "case {} {}", verdict.case, verdict.proof_version);
        ran += 1;
    }
    grail_golden::ran(FILE, ran, 1 + file.cases.len() + file.commit_verify.len());
}
