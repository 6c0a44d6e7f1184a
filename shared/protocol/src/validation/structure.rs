//! Structure of the file (validation §2): wallet, window and every row, first miss wins.

use std::collections::{HashMap, HashSet};

use super::context::ValidationContext;
use crate::constants::ROLLOUTS_PER_PROBLEM;
use crate::window_file::WindowFile;

/// Why a file is rejected as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rejection {
    WalletMismatch,
    WindowMismatch,
    NullRolloutGroup,
    WindowStartMismatch,
    BlockHashMismatch,
    DuplicateNonce,
    InvalidGroupSize,
}

impl Rejection {
    /// The part of the reason after `file:`.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::WalletMismatch => "wallet_mismatch",
            Self::WindowMismatch => "window_mismatch",
            Self::NullRolloutGroup => "null_rollout_group",
            Self::WindowStartMismatch => "window_start_mismatch",
            Self::BlockHashMismatch => "block_hash_mismatch",
            Self::DuplicateNonce => "duplicate_nonce",
            Self::InvalidGroupSize => "invalid_group_size",
        }
    }
}

/// # Errors
/// The first [`Rejection`].
pub fn check_structure(file: &WindowFile, context: &ValidationContext) -> Result<(), Rejection> {
    let window = context.window.block().0;
    if file.metadata.wallet != context.hotkey.0 {
        return Err(Rejection::WalletMismatch);
    }
    if file.metadata.window_start != i128::from(window) {
        return Err(Rejection::WindowMismatch);
    }
    let mut nonces: HashSet<Option<i64>> = HashSet::with_capacity(file.rows.len());
    let mut sizes: HashMap<i64, usize> = HashMap::new();
    for row in &file.rows {
        let group = row.rollout_group.ok_or(Rejection::NullRolloutGroup)?;
        if row.window_start.map(i128::from) != Some(i128::from(window)) {
            return Err(Rejection::WindowStartMismatch);
        }
        if row.block_hash.as_deref() != Some(context.window_hash.0.as_str()) {
            return Err(Rejection::BlockHashMismatch);
        }
        if !nonces.insert(row.nonce) {
            return Err(Rejection::DuplicateNonce);
        }
        *sizes.entry(group).or_default() += 1;
    }
    if sizes.values().any(|size| *size != ROLLOUTS_PER_PROBLEM) {
        return Err(Rejection::InvalidGroupSize);
    }
    Ok(())
}
