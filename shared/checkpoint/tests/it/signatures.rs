//! The trainer's signatures over the documents of the golden stores.

use std::collections::BTreeSet;

use crate::golden_installs::Bench;
use grail_checkpoint::layout::{SIGNATURE_FILE, Tree, object_key, parse_object_key};
use grail_checkpoint::{Notice, SignatureCheck, SignatureDefect, Wanted};
use grail_protocol::ids::{CheckpointWindow, Hotkey};
use grail_protocol::keys;
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Signer {
    trainer_ss58: Hotkey,
    trainer_public_key: String,
    scheme: String,
    note: String,
}

fn signature_check(signer: &Signer) -> SignatureCheck {
    let hotkey = signer.trainer_ss58.clone();
    SignatureCheck::new(move |message, signature| {
        signature.parse().is_ok_and(|signature| keys::verify(&hotkey, message, &signature))
    })
}

#[tokio::test]
async fn signatures() {
    let file = "checkpoints/signer.json";
    let signer: Signer = grail_golden::json(file);
    let key = keys::Keypair::from_uri("//Alice").unwrap();
    assert_eq!(
        (key.hotkey(), hex::encode(key.public_key())),
        (&signer.trainer_ss58, signer.trainer_public_key.clone())
    );
    assert!(signer.scheme == "sr25519" && signer.note.contains("//Alice"));
    let check = signature_check(&signer);
    let mut wrong = BTreeSet::new();
    let mut signed = 0;
    for bucket in ["bucket", "bucket_tied", "bucket_quirks"] {
        let bench = Bench::over(bucket);
        let listing = bench.store.list().await.unwrap();
        let windows: BTreeSet<_> = listing.keys().filter_map(parse_object_key).map(|object| object.window).collect();
        for window in windows {
            let published = bench.store.published(window).await.unwrap();
            for metadata in [&published.full, &published.delta].into_iter().flatten() {
                signed += 1;
                let key = object_key(window, metadata.tree, SIGNATURE_FILE);
                let signature = bench.store.read(&key).await.unwrap().unwrap();
                if let Err(defect) = check.check(metadata, Some(&signature)) {
                    assert_eq!(defect, SignatureDefect::Wrong);
                    wrong.insert((window.0, metadata.tree));
                }
                assert_eq!(check.check(metadata, None), Err(SignatureDefect::Missing));
                assert_eq!(check.check(metadata, Some(b"\xff")), Err(SignatureDefect::Wrong));
            }
        }
    }
    let delta = |window| (window, Tree::Delta);
    // The trees that were edited after they were signed.
    let edited = [9150, 9180, 9270, 9330, 9360, 9420, 9480].map(delta);
    assert_eq!(wrong, edited.into_iter().chain([(9240, Tree::Full)]).collect());
    grail_golden::ran(file, signed, 39);
}

#[tokio::test]
async fn a_wrong_signature_is_reported_and_stops_nothing() {
    let check = signature_check(&grail_golden::json("checkpoints/signer.json"));
    let wanted = Wanted { signature: Some(check), ..Wanted::default() };
    let bench = Bench::over("bucket_quirks");
    let (_, installed) = bench.install(CheckpointWindow(9240), &wanted).await;
    let notice = Notice::Signature { tree: Tree::Full, defect: SignatureDefect::Wrong };
    assert_eq!(installed.unwrap().notices, [notice, Notice::HashDiffers]);
    let sound = Bench::over("bucket");
    let (_, installed) = sound.install(CheckpointWindow(3300), &wanted).await;
    assert_eq!(installed.unwrap().notices, []);
}
