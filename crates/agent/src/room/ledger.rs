//! Decides whose folder is worth measuring, and who must stop. Pure: free space and sizes come in as numbers.

use std::collections::BTreeMap;

use sealci_core::ids::AttemptId;

use super::{RoomLimits, Stop};

/// What is known of the disk and of those who work on it.
#[derive(Debug)]
pub struct Ledger {
    limits: RoomLimits,
    free_bytes: Option<u64>,
    /// All that the disk ever lost, gains left out: nobody can have written more than it says.
    lost_bytes: u64,
    accounts: BTreeMap<AttemptId, Account>,
}

#[derive(Debug)]
struct Account {
    /// None: not measured yet.
    size_bytes: Option<u64>,
    /// What the disk had lost when that was.
    lost_before_bytes: u64,
    is_stopped: bool,
}

impl Ledger {
    pub fn new(limits: RoomLimits) -> Self {
        Self { limits, free_bytes: None, lost_bytes: 0, accounts: BTreeMap::new() }
    }

    pub fn enter(&mut self, attempt: AttemptId) {
        let account = Account { size_bytes: None, lost_before_bytes: self.lost_bytes, is_stopped: false };
        self.accounts.insert(attempt, account);
    }

    pub fn leave(&mut self, attempt: AttemptId) {
        self.accounts.remove(&attempt);
    }

    pub fn bound_bytes(&self) -> u64 {
        self.limits.workspace_bytes
    }

    pub fn note_free(&mut self, free_bytes: u64) {
        let before = self.free_bytes.replace(free_bytes).unwrap_or(free_bytes);
        self.lost_bytes = self.lost_bytes.saturating_add(before.saturating_sub(free_bytes));
    }

    /// What is to be kept free.
    pub fn reserve_bytes(&self) -> u64 {
        self.limits.reserve_bytes
    }

    /// Whether less than the reserve is free.
    pub fn is_low(&self) -> bool {
        self.free_bytes.is_some_and(|free_bytes| free_bytes < self.limits.reserve_bytes)
    }

    /// Whose folders are to be measured: everyone's while the disk is low, else theirs who may have come near the bound.
    pub fn due(&self) -> Vec<AttemptId> {
        let is_due = |account: &Account| {
            !account.is_stopped
                && (self.is_low()
                    || self.lost_bytes.saturating_sub(account.lost_before_bytes)
                        > self.patience_bytes(account))
        };
        self.accounts.iter().filter(|(_, account)| is_due(account)).map(|(id, _)| *id).collect()
    }

    /// So much the disk may lose until the folder is measured again: half of what it lacks to its bound, but not so
    /// little that it is walked for every file.
    fn patience_bytes(&self, account: &Account) -> u64 {
        let bound_bytes = self.limits.workspace_bytes;
        match account.size_bytes {
            None => bound_bytes / 8,
            Some(size_bytes) => (bound_bytes.saturating_sub(size_bytes) / 2).max(bound_bytes / 64),
        }
    }

    /// Takes sizes down. Who must stop now is in the answer, and never again.
    pub fn measured(&mut self, sizes: &[(AttemptId, u64)]) -> Vec<(AttemptId, Stop)> {
        let RoomLimits { workspace_bytes: bound_bytes, reserve_bytes } = self.limits;
        let mut stops = Vec::new();
        let mut largest_growing: Option<(AttemptId, u64)> = None;
        for &(attempt, size_bytes) in sizes {
            // Who has left since it was measured is not here.
            let Some(account) = self.accounts.get_mut(&attempt) else { continue };
            let has_grown = account.size_bytes.is_some_and(|before| size_bytes > before);
            account.size_bytes = Some(size_bytes);
            account.lost_before_bytes = self.lost_bytes;
            if size_bytes > bound_bytes {
                account.is_stopped = true;
                stops.push((attempt, Stop::OverBound { size_bytes, bound_bytes }));
            } else if has_grown && largest_growing.is_none_or(|(_, largest)| size_bytes > largest) {
                largest_growing = Some((attempt, size_bytes));
            }
        }
        if let Some((attempt, size_bytes)) = largest_growing
            && let Some(free_bytes) = self.free_bytes.filter(|_| self.is_low() && self.may_stop_another())
            && let Some(account) = self.accounts.get_mut(&attempt)
        {
            account.is_stopped = true;
            stops.push((attempt, Stop::DiskAlmostFull { size_bytes, free_bytes, reserve_bytes }));
        }
        stops
    }

    /// The one that was stopped gets time to give its room back, while there is some.
    fn may_stop_another(&self) -> bool {
        let one_is_on_its_way = self.accounts.values().any(|account| account.is_stopped);
        !one_is_on_its_way || self.free_bytes.is_some_and(|free| free < self.limits.reserve_bytes / 2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;

    const LIMITS: RoomLimits = RoomLimits { workspace_bytes: 6400, reserve_bytes: 1000 };

    fn id(number: u32) -> AttemptId {
        AttemptId { action: ActionId::from_parts(1, &[0; 10]), number }
    }

    fn ledger(occupants: u32) -> Ledger {
        let mut ledger = Ledger::new(LIMITS);
        ledger.note_free(100_000);
        (1..=occupants).for_each(|number| ledger.enter(id(number)));
        ledger
    }

    #[test]
    fn folders_are_walked_only_when_the_disk_lost_enough() {
        let mut ledger = ledger(1);
        assert_eq!(ledger.due(), []);
        ledger.note_free(99_200);
        assert_eq!(ledger.due(), []);
        // What others give back hides nothing.
        ledger.note_free(200_000);
        ledger.note_free(199_999);
        assert_eq!(ledger.due(), [id(1)]);
        assert_eq!(ledger.measured(&[(id(1), 400)]), []);
        assert_eq!(ledger.due(), []);
        ledger.note_free(199_999 - 3000);
        assert_eq!(ledger.due(), []);
        ledger.note_free(199_999 - 3001);
        assert_eq!(ledger.due(), [id(1)]);
        // Close to its bound it is not walked for every byte.
        ledger.measured(&[(id(1), 6399)]);
        ledger.note_free(199_999 - 3101);
        assert_eq!(ledger.due(), []);
        ledger.note_free(199_999 - 3102);
        assert_eq!(ledger.due(), [id(1)]);
    }

    #[test]
    fn only_who_is_over_its_bound_stops_and_is_told_once() {
        let mut ledger = ledger(2);
        ledger.note_free(50_000);
        assert_eq!(
            ledger.measured(&[(id(1), 6400), (id(2), 6401)]),
            [(id(2), Stop::OverBound { size_bytes: 6401, bound_bytes: 6400 })]
        );
        ledger.note_free(10_000);
        assert_eq!(ledger.due(), [id(1)]);
    }

    #[test]
    fn below_the_reserve_the_largest_that_grows_stops_and_the_others_wait() {
        let mut ledger = ledger(3);
        ledger.note_free(900);
        let all = |sizes: [u64; 3]| [(id(1), sizes[0]), (id(2), sizes[1]), (id(3), sizes[2])];
        // Nobody was seen to grow yet.
        assert_eq!(ledger.due().len(), 3);
        assert_eq!(ledger.measured(&all([3000, 100, 2000])), []);
        let stops = ledger.measured(&all([3000, 200, 2100]));
        let stop = Stop::DiskAlmostFull { size_bytes: 2100, free_bytes: 900, reserve_bytes: 1000 };
        assert_eq!(stops, [(id(3), stop)]);
        assert_eq!(ledger.due(), [id(1), id(2)]);
        assert_eq!(ledger.measured(&[(id(2), 300)]), []);
        // It takes too long.
        ledger.note_free(400);
        assert_eq!(ledger.measured(&[(id(2), 400)]).len(), 1);
        ledger.leave(id(2));
        ledger.leave(id(3));
        ledger.note_free(5000);
        assert_eq!(ledger.due(), []);
    }

    #[test]
    fn without_a_reserve_a_full_disk_stops_nobody() {
        let mut ledger = Ledger::new(RoomLimits { reserve_bytes: 0, ..LIMITS });
        ledger.enter(id(1));
        ledger.note_free(0);
        assert_eq!(ledger.due(), []);
        assert_eq!(ledger.measured(&[(id(1), 1)]), []);
        assert_eq!(ledger.measured(&[(id(1), 2)]), []);
    }
}
