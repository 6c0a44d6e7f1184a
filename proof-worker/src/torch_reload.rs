//! Reloads of a model on libtorch: into a second copy if there is memory for it, else where the weights lie.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use grail_ipc::jobs::ReloadOrder;
use grail_ipc::messages::ChangeSet;
use grail_model::checksum::{self, Checksums};
use grail_model::measure::free_memory;
use grail_model::weights::WeightFiles;
use grail_model::{
    ChangeError, Changes, Device, LoadError, LoadOptions, Model, ModelConfig, ProofModel, StagedChanges, Undo,
    beside_proofs,
};
use grail_process::with_causes;
use grail_protocol::ids::WeightsHash;
use tracing::{debug, error, info, warn};

use crate::prover::{ComputeError, Prepared, Reloader, Retired, Way};
use crate::torch::Shadow;

/// Memory that a reload leaves free for batches and everything else.
const RESERVE_BYTES: u64 = 1 << 30;

/// The model that proves. It is replaced or changed between two batches only.
#[derive(Debug)]
pub(crate) struct Slot {
    model: RwLock<ProofModel>,
    /// Bytes of freed copies and changes that libtorch keeps on a GPU: the driver counts them as in use, and what is made ready next gets
    /// them.
    spare_bytes: AtomicU64,
}

impl Slot {
    pub(crate) fn new(model: ProofModel) -> Self {
        Self { model: RwLock::new(model), spare_bytes: AtomicU64::new(0) }
    }

    pub(crate) fn model(&self) -> ProofModel {
        self.model.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether another `bytes` fit beside what is there.
    fn has_room(&self, device: Device, bytes: u64) -> bool {
        let spare = if device == Device::Cpu { 0 } else { self.spare_bytes.load(Ordering::Relaxed) };
        let room = free_memory(device).map(|free| free.saturating_add(spare));
        debug!(%device, room, needed = bytes, reserve = RESERVE_BYTES, "Looked for room for a second copy.");
        // Where nobody says, an allocation that fails does.
        room.is_none_or(|room| room >= bytes.saturating_add(RESERVE_BYTES))
    }
}

/// Makes weights ready for a [`Slot`].
#[derive(Debug)]
pub(crate) struct TorchReloader {
    slot: Arc<Slot>,
    shadow: Shadow,
}

impl Reloader for TorchReloader {
    fn prepare(&mut self, order: &ReloadOrder) -> Result<Box<dyn Prepared>, ComputeError> {
        let present = self.slot.model();
        beside_proofs(present.device(), || self.prepare_beside(present, order))
    }
}

impl TorchReloader {
    fn prepare_beside(&self, present: ProofModel, order: &ReloadOrder) -> Result<Box<dyn Prepared>, ComputeError> {
        if let Some(sets) = way_by_changes(present.model(), order) {
            match self.by_changes(&present, order, sets) {
                Ok(prepared) => return Ok(prepared),
                Err(error) => warn!(error = with_causes(&*error), "Changes cannot be used; reading the folder."),
            }
        }
        self.by_folder(&present, order).map_err(|error| still_held(present.model(), order, &*error))
    }
}

/// A refused order for other weights leaves those that are there. One to read the present weights anew was given because they
/// are in doubt, so they prove on only if they are what they should be.
fn still_held(model: &Model, order: &ReloadOrder, error: &(dyn std::error::Error + 'static)) -> ComputeError {
    if order.weights != model.weights_hash() {
        return refused(error);
    }
    let wanted = wanted(order);
    let lost = |why: String| ComputeError::WeightsLost { detail: format!("{}; {why}", with_causes(error)) };
    if wanted.is_empty() || !model.is_exact() {
        return lost("nothing says whether the weights that are held are right".to_owned());
    }
    match model.checksums() {
        Ok(held) => match checksum::compare(&held, &wanted, model.config()) {
            Ok(()) => refused(error),
            Err(difference) => lost(format!("the weights that are held are not right: {}", with_causes(&difference))),
        },
        Err(failure) => lost(format!("the weights that are held cannot be summed: {}", with_causes(&failure))),
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn refused(error: &(dyn std::error::Error + 'static)) -> ComputeError {
    ComputeError::Reload { detail: with_causes(error) }
}

/// The sets that lead from the weights that are there to those of the order, if there are such and they may be used.
fn way_by_changes<'o>(present: &Model, order: &'o ReloadOrder) -> Option<&'o [ChangeSet]> {
    // Without checksums nothing would show that the changes are the right ones.
    if order.anew || order.checksums.is_empty() || !present.is_exact() {
        return None;
    }
    let first = order.changes.iter().position(|set| set.base == present.weights_hash())?;
    let sets = order.changes.get(first..)?;
    let is_chain = sets.windows(2).all(|pair| pair[0].weights == pair[1].base);
    let leads_there = sets.last().is_some_and(|last| last.weights == order.weights);
    // Changes of weights do not change what config.json says.
    let is_same_model = ModelConfig::from_dir(&order.folder).is_ok_and(|config| config == *present.config());
    (is_chain && leads_there && is_same_model).then_some(sets)
}

fn wanted(order: &ReloadOrder) -> Checksums {
    order.checksums.iter().map(|tensor| (tensor.name.clone(), tensor.checksum)).collect()
}

impl TorchReloader {
    pub(crate) const fn new(slot: Arc<Slot>, shadow: Shadow) -> Self {
        Self { slot, shadow }
    }

    fn may_copy(&self, device: Device, bytes: u64) -> bool {
        match self.shadow {
            Shadow::Always => true,
            Shadow::Never => false,
            Shadow::Auto => self.slot.has_room(device, bytes),
        }
    }

    /// What makes a copy; `None` if it turns out that there is no memory for one.
    fn copy<E>(
        &self,
        make: impl FnOnce() -> Result<Model, E>,
        is_memory: impl Fn(&E) -> bool,
    ) -> Result<Option<Copied>, E> {
        // Whatever was kept is used up now.
        self.slot.spare_bytes.store(0, Ordering::Relaxed);
        match make() {
            Ok(model) => {
                let spare = Spare { slot: Arc::clone(&self.slot), bytes: model.weight_bytes() };
                Ok(Some(Copied { model, spare, from_changes: false }))
            }
            Err(error) if self.shadow == Shadow::Auto && is_memory(&error) => {
                info!("A second copy does not fit; the weights will be changed in place.");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn by_changes(
        &self,
        present: &ProofModel,
        order: &ReloadOrder,
        sets: &[ChangeSet],
    ) -> Result<Box<dyn Prepared>, Failure> {
        let model = present.model();
        let open = |set: &ChangeSet| Changes::open(set.file.as_ref(), model);
        let changes = sets.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        if self.may_copy(model.device(), model.weight_bytes())
            && let Some(mut copy) = self.copy(|| model.copy(), |error| matches!(error, LoadError::Torch(_)))?
        {
            for changes in &changes {
                copy.model.apply_to_copy(changes)?;
            }
            copy.model.confirm(order.weights, &wanted(order))?;
            return Ok(Box::new(Copied { from_changes: true, ..copy }));
        }
        let before = model.checksums()?;
        if let [changes] = changes.as_slice()
            && let Some(staged) = self.staged(model, changes, (&before, &wanted(order)))?
        {
            let slot = Arc::clone(&self.slot);
            let bytes = changes.staged_bytes(model).unwrap_or_default();
            let spare = Spare { slot: Arc::clone(&self.slot), bytes };
            return Ok(Box::new(StagedInPlace { slot, staged, spare, before, weights: order.weights }));
        }
        Ok(Box::new(InPlace {
            slot: Arc::clone(&self.slot),
            changes,
            before,
            wanted: wanted(order),
            weights: order.weights,
            from_changes: true,
        }))
    }

    /// Changes beside the weights, if they can be there and there is memory for them.
    fn staged(
        &self,
        model: &Model,
        changes: &Changes,
        (before, wanted): (&Checksums, &Checksums),
    ) -> Result<Option<StagedChanges>, Failure> {
        if !changes.staged_bytes(model).is_some_and(|bytes| self.slot.has_room(model.device(), bytes)) {
            return Ok(None);
        }
        // Whatever was kept is used up now.
        self.slot.spare_bytes.store(0, Ordering::Relaxed);
        match model.stage(changes, before, wanted) {
            Ok(staged) => Ok(Some(staged)),
            Err(ChangeError::Torch(error)) => {
                info!(%error, "Changes cannot lie beside the weights; they are read when they are due.");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn by_folder(&self, present: &ProofModel, order: &ReloadOrder) -> Result<Box<dyn Prepared>, Failure> {
        let config = ModelConfig::from_dir(&order.folder)?;
        let element_bytes = present.model().weight_bytes() / (present.config().parameters() as u64).max(1);
        let bytes = config.parameters() as u64 * element_bytes;
        if self.may_copy(present.device(), bytes)
            && let Some(copy) = self.copy(|| read(present.model(), order), |error| is_torch(&**error))?
        {
            return Ok(Box::new(copy));
        }
        self.folder_in_place(present.model(), order)
    }

    fn folder_in_place(&self, model: &Model, order: &ReloadOrder) -> Result<Box<dyn Prepared>, Failure> {
        let changes = Changes::from_folder(&order.folder, model)?;
        let found = changes.files().map(WeightFiles::checksums).unwrap_or_default();
        let mut wanted = wanted(order);
        if wanted.is_empty() {
            let hash = changes.files().map_or(WeightsHash(0), WeightFiles::hash);
            if hash != order.weights {
                return Err(format!(
                    "folder {} holds weights {hash}, the command names {}",
                    order.folder.display(),
                    order.weights
                )
                .into());
            }
            wanted.clone_from(&found);
        }
        // Wrong files are found before anything is touched.
        checksum::compare(&found, &wanted, model.config())?;
        Ok(Box::new(InPlace {
            slot: Arc::clone(&self.slot),
            changes: vec![changes],
            before: model.checksums()?,
            wanted,
            weights: order.weights,
            from_changes: false,
        }))
    }
}

fn is_torch(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(LoadError::Torch(_)))
}

/// A model of the order's folder like `present`, checked as well as the order allows.
fn read(present: &Model, order: &ReloadOrder) -> Result<Model, Failure> {
    let wanted = wanted(order);
    let options = LoadOptions {
        dtype: Some(present.dtype()),
        batch_tokens: present.batch_tokens(),
        // The checksums say that it is right; until then nobody sees it.
        known_hash: (!wanted.is_empty()).then_some(order.weights),
        ..LoadOptions::on(present.device())
    };
    let model = Model::load(&order.folder, &options)?;
    if wanted.is_empty() {
        return Ok(model);
    }
    if model.is_exact() {
        model.compare(&wanted)?;
    } else {
        checksum::compare(&WeightFiles::open(&order.folder)?.checksums(), &wanted, model.config())?;
    }
    Ok(model)
}

/// A second copy that holds the new weights.
struct Copied {
    model: Model,
    /// Behind the model, so that it is dropped after it.
    spare: Spare,
    from_changes: bool,
}

/// Takes note of memory that a copy or changes have given back when it is dropped.
struct Spare {
    slot: Arc<Slot>,
    bytes: u64,
}

impl Drop for Spare {
    fn drop(&mut self) {
        self.slot.spare_bytes.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

impl Prepared for Copied {
    fn weights(&self) -> WeightsHash {
        self.model.weights_hash()
    }

    fn way(&self) -> Way {
        Way { from_changes: self.from_changes, in_shadow: true }
    }

    fn is_ready(&self) -> bool {
        true
    }

    fn take_over(self: Box<Self>) -> Result<Retired, ComputeError> {
        let Self { model, spare, .. } = *self;
        let slot = Arc::clone(&spare.slot);
        let mut held = slot.model.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *held, ProofModel::new(Arc::new(model)));
        Ok(Box::new((old, spare)))
    }
}

/// Changes that lie beside the weights, and lead where they should.
struct StagedInPlace {
    slot: Arc<Slot>,
    staged: StagedChanges,
    /// Behind the changes, so that it is dropped after them.
    #[expect(dead_code, reason = "it takes note when it is dropped")]
    spare: Spare,
    /// Checksums of the old weights, to know whether they are back.
    before: Checksums,
    weights: WeightsHash,
}

impl Prepared for StagedInPlace {
    fn weights(&self) -> WeightsHash {
        self.weights
    }

    fn way(&self) -> Way {
        Way { from_changes: true, in_shadow: false }
    }

    fn is_ready(&self) -> bool {
        true
    }

    fn take_over(self: Box<Self>) -> Result<Retired, ComputeError> {
        let slot = Arc::clone(&self.slot);
        let mut held = slot.model.write().unwrap_or_else(PoisonError::into_inner);
        let model = held.exclusive().ok_or_else(in_use)?;
        match model.take(&self.staged, self.weights) {
            Ok(()) => Ok(self),
            Err(error @ ChangeError::OtherWeights { .. }) => Err(refused(&error)),
            Err(error) => {
                let back = model.give_back(&self.staged);
                Err(taken_back(&error, back.map_err(Failure::from).and_then(|()| Ok(model.compare(&self.before)?))))
            }
        }
    }
}

fn in_use() -> ComputeError {
    ComputeError::Reload { detail: "the weights are in use elsewhere".to_owned() }
}

/// What a reload that failed has left, by whether the old weights are `back`.
fn taken_back(error: &(dyn std::error::Error + 'static), back: Result<(), Failure>) -> ComputeError {
    let reason = with_causes(error);
    match back {
        Ok(()) => ComputeError::Reload { detail: format!("{reason}; every change was taken back") },
        Err(failure) => {
            error!(error = reason, undo = with_causes(&*failure), "The old weights are lost.");
            ComputeError::WeightsLost { detail: format!("{reason}; taking it back failed: {}", with_causes(&*failure)) }
        }
    }
}

/// Changes for the weights where they lie.
struct InPlace {
    slot: Arc<Slot>,
    changes: Vec<Changes>,
    /// Checksums of the old weights, to know whether they are back.
    before: Checksums,
    wanted: Checksums,
    weights: WeightsHash,
    from_changes: bool,
}

impl Prepared for InPlace {
    fn weights(&self) -> WeightsHash {
        self.weights
    }

    fn way(&self) -> Way {
        Way { from_changes: self.from_changes, in_shadow: false }
    }

    /// The files were checked; they are read between the batches.
    fn is_ready(&self) -> bool {
        false
    }

    fn take_over(self: Box<Self>) -> Result<Retired, ComputeError> {
        let slot = Arc::clone(&self.slot);
        let mut held = slot.model.write().unwrap_or_else(PoisonError::into_inner);
        let model = held.exclusive().ok_or_else(in_use)?;
        let mut applied = Vec::with_capacity(self.changes.len());
        match self.change(model, &mut applied) {
            Ok(()) => Ok(self),
            Err(error) => Err(self.take_back(model, applied, &*error)),
        }
    }
}

impl InPlace {
    /// Changes the weights and compares them; `applied` gets the old bits as far as it came.
    fn change<'s>(&'s self, model: &mut Model, applied: &mut Vec<(&'s Changes, Option<Undo>)>) -> Result<(), Failure> {
        for changes in &self.changes {
            let needed = Undo::bytes_for(changes, model).saturating_add(RESERVE_BYTES);
            let keeps = free_memory(Device::Cpu).is_none_or(|free| free >= needed);
            if !keeps {
                warn!(needed, "No memory for the old bits: a reload that fails ends this worker.");
            }
            applied.push((changes, keeps.then(Undo::default)));
            let undo = applied.last_mut().and_then(|(_, undo)| undo.as_mut());
            model.apply(changes, undo)?;
        }
        Ok(model.confirm(self.weights, &self.wanted)?)
    }

    fn take_back(
        &self,
        model: &mut Model,
        applied: Vec<(&Changes, Option<Undo>)>,
        error: &(dyn std::error::Error + 'static),
    ) -> ComputeError {
        let back = applied.into_iter().rev().try_for_each(|(changes, undo)| {
            let undo = undo.ok_or("there was no memory to keep the old bits")?;
            Ok::<_, Failure>(model.revert(changes, undo)?)
        });
        taken_back(error, back.and_then(|()| Ok(model.compare(&self.before)?)))
    }
}
