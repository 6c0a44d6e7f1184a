//! sr25519 keys of a hotkey: signing, verification, SS58 (feature `keys`).

use std::fmt;
use std::str::FromStr;

use sp_core::Pair as _;
use sp_core::crypto::Ss58Codec as _;
use sp_core::sr25519;

use crate::hex_text::bytes_from_hex;
use crate::ids::Hotkey;

/// Address format of a hotkey, "any Substrate network".
pub const SS58_FORMAT: u16 = 42;
/// Secret URI of the hotkey that the embedded default mines with. It is public: the key of no account.
pub const DEMO_HOTKEY_URI: &str = "//grail-supervisor//demo";

/// A secret that makes no key.
///
/// The text never contains the secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// No secret URI: not a phrase, a hex seed or a derivation path.
    #[error("the secret URI is no phrase, hexadecimal seed or derivation path")]
    SecretUri,
    /// Words or checksum are wrong.
    #[error("the mnemonic phrase is invalid")]
    Mnemonic,
    /// Wrong length, alphabet, checksum or network.
    #[error("the address is no SS58 address of a general account")]
    Address,
    /// Not 64 bytes in hexadecimal.
    #[error("the signature is not 128 hexadecimal digits")]
    Signature,
}

/// A hotkey's key pair. Neither `Debug` nor any other method shows the secret; it is wiped from memory when dropped.
///
/// The expanded key is kept, so a signature costs one scalar multiplication and no derivation.
#[derive(Clone)]
pub struct Keypair {
    pair: sr25519::Pair,
    hotkey: Hotkey,
}

impl Keypair {
    fn new(pair: sr25519::Pair) -> Self {
        let hotkey = encode_address(&pair.public().0);
        Self { pair, hotkey }
    }

    /// From a secret URI: a phrase, `0x` and 64 hexadecimal digits, or a derivation path such as `//Alice` (then of the public
    /// development phrase), each perhaps with a path behind it.
    ///
    /// # Errors
    /// [`KeyError::SecretUri`].
    pub fn from_uri(uri: &str) -> Result<Self, KeyError> {
        sr25519::Pair::from_string(uri, None).map(Self::new).map_err(|_| KeyError::SecretUri)
    }

    /// From a BIP-39 phrase without a password.
    ///
    /// # Errors
    /// [`KeyError::Mnemonic`].
    pub fn from_mnemonic(phrase: &str) -> Result<Self, KeyError> {
        sr25519::Pair::from_phrase(phrase, None).map(|(pair, _)| Self::new(pair)).map_err(|_| KeyError::Mnemonic)
    }

    /// From a 32-byte mini secret.
    #[must_use]
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self::new(sr25519::Pair::from_seed(seed))
    }

    /// The address.
    #[must_use]
    pub const fn hotkey(&self) -> &Hotkey {
        &self.hotkey
    }

    /// The 32 bytes of the public key.
    #[must_use]
    pub fn public_key(&self) -> [u8; 32] {
        self.pair.public().0
    }

    /// Signs `message` as it is, with signing context `substrate`. Two signatures of one message differ.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.pair.sign(message).0)
    }
}

impl fmt::Debug for Keypair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keypair").field("hotkey", &self.hotkey).finish_non_exhaustive()
    }
}

/// An sr25519 signature; `Display` gives the 128 lower-case digits of the window file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature(pub [u8; 64]);

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({self})")
    }
}

impl FromStr for Signature {
    type Err = KeyError;
    /// Reads what Python's `bytes.fromhex` reads, if it is 64 bytes.
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let bytes = bytes_from_hex(text).map_err(|_| KeyError::Signature)?;
        bytes.try_into().map(Self).map_err(|_| KeyError::Signature)
    }
}

/// True if `hotkey` signed `message`, plainly or wrapped as `<Bytes>…</Bytes>`, which is what the reference's library accepts.
/// An address that does not decode verifies nothing.
#[must_use]
pub fn verify(hotkey: &Hotkey, message: &[u8], signature: &Signature) -> bool {
    decode_address(&hotkey.0).is_ok_and(|public_key| verify_with_public_key(&public_key, message, signature))
}

/// [`verify`] with a public key that is already decoded.
#[must_use]
pub fn verify_with_public_key(public_key: &[u8; 32], message: &[u8], signature: &Signature) -> bool {
    let public_key = sr25519::Public::from(*public_key);
    let signature = sr25519::Signature::from(signature.0);
    if sr25519::Pair::verify(&signature, message, &public_key) {
        return true;
    }
    let wrapped = [b"<Bytes>", message, b"</Bytes>"].concat();
    sr25519::Pair::verify(&signature, wrapped, &public_key)
}

/// The SS58 address of a public key, format 42.
#[must_use]
pub fn encode_address(public_key: &[u8; 32]) -> Hotkey {
    Hotkey(sr25519::Public::from(*public_key).to_ss58check_with_version(SS58_FORMAT.into()))
}

/// The public key of an SS58 address; the checksum is verified.
///
/// # Errors
/// [`KeyError::Address`].
pub fn decode_address(address: &str) -> Result<[u8; 32], KeyError> {
    sr25519::Public::from_ss58check(address).map(|public_key| public_key.0).map_err(|_| KeyError::Address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_the_address_and_no_secret() {
        let keypair = Keypair::from_seed(&[0x11; 32]);
        let shown = format!("{keypair:?}");
        assert_eq!(shown, "Keypair { hotkey: Hotkey(\"5DtDLm5rQHShDqojQpsvcN8tRXHVFaecfDoRet1SU6BFD9Fi\"), .. }");
    }

    #[test]
    fn bad_secrets_and_addresses_are_refused_without_being_shown() {
        assert_eq!(Keypair::from_uri("not words at all").unwrap_err(), KeyError::SecretUri);
        assert_eq!(Keypair::from_mnemonic("bottom drive obey").unwrap_err(), KeyError::Mnemonic);
        let alice = Keypair::from_uri("//Alice").unwrap();
        let mut damaged = alice.hotkey().0.clone();
        damaged.replace_range(10..11, if &damaged[10..11] == "a" { "b" } else { "a" });
        assert_eq!(decode_address(&damaged).unwrap_err(), KeyError::Address);
        assert_eq!(decode_address(&alice.hotkey().0).unwrap(), alice.public_key());
        assert!(!verify(&Hotkey(damaged), b"message", &alice.sign(b"message")));
    }

    #[test]
    fn signature_text_round_trips_and_other_lengths_are_refused() {
        let signature = Keypair::from_seed(&[3; 32]).sign(b"text");
        assert_eq!(signature.to_string().parse::<Signature>().unwrap(), signature);
        assert_eq!(signature.to_string().len(), 128);
        for text in ["", "00", &"0".repeat(127), &"0".repeat(130), &"g".repeat(128)] {
            assert_eq!(text.parse::<Signature>().unwrap_err(), KeyError::Signature);
        }
    }

    #[test]
    fn every_other_message_fails() {
        let keypair = Keypair::from_uri("//Bob").unwrap();
        let signature = keypair.sign(b"plain");
        assert!(verify(keypair.hotkey(), b"plain", &signature));
        assert!(!verify(keypair.hotkey(), b"plain ", &signature));
        assert!(!verify(keypair.hotkey(), b"<Bytes>plain</Bytes>", &signature));
        let wrapped = keypair.sign(b"<Bytes>plain</Bytes>");
        assert!(verify(keypair.hotkey(), b"plain", &wrapped));
    }
}
