//! Decides what to do about each thing that the scheduler desires, given what the agent holds. Pure.

use std::time::Duration;

use sealci_proto::agent::{HeldState, desired_entry};

/// What is to be done about one attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Hold it from now on: prepare, ask its claim, run.
    TakeOn,
    /// It is held, and still not granted: ask again.
    AskAgain,
    /// End it properly; its terminal event will say so. One that is not granted, as far as is heard, waits for its claim's
    /// answer: what is to be cancelled is claimed.
    Cancel { grace: Duration },
    /// End it at once, and report nothing.
    Forget,
    /// The same, unless its claim is under way: that may be granted by now, and the answer says whose it is.
    ForgetUnasked,
    /// Leave things as they are. What is not held is missing in the next `Held`, which says enough.
    Leave,
}

/// Decides about one desired entry. `held` is the attempt's state, if it is held; `takes_new` whether the agent takes
/// anything on now.
pub fn decide(wish: &desired_entry::Wish, held: Option<HeldState>, takes_new: bool) -> Decision {
    use desired_entry::Wish;
    match (wish, held) {
        (Wish::Run(_), None) if takes_new => Decision::TakeOn,
        (Wish::Run(_), Some(HeldState::Assigned)) => Decision::AskAgain,
        (Wish::Run(_) | Wish::Keep(_), _) => Decision::Leave,
        (Wish::Cancel(_), None | Some(HeldState::Finished)) => Decision::Leave,
        (Wish::Cancel(cancel), Some(_)) => Decision::Cancel { grace: Duration::from_millis(cancel.grace_ms) },
        (Wish::Drop(_), Some(HeldState::Assigned)) => Decision::ForgetUnasked,
        (Wish::Drop(_), Some(_)) => Decision::Forget,
        (Wish::Drop(_), None) => Decision::Leave,
    }
}

/// Whether an agent that is superseded by another instance goes on with an attempt: it finishes what it claimed.
pub fn survives_superseding(held: HeldState) -> bool {
    held != HeldState::Assigned
}

#[cfg(test)]
mod tests {
    use super::*;
    use desired_entry::Wish;
    use sealci_proto::agent::{Cancel, Drop, Keep, Run};

    const STATES: [HeldState; 4] =
        [HeldState::Assigned, HeldState::Claimed, HeldState::Running, HeldState::Finished];

    #[test]
    fn a_run_is_taken_on_once_and_only_when_there_is_room() {
        let run = Wish::Run(Run::default());
        assert_eq!(decide(&run, None, true), Decision::TakeOn);
        assert_eq!(decide(&run, None, false), Decision::Leave);
        for takes_new in [true, false] {
            assert_eq!(decide(&run, Some(HeldState::Assigned), takes_new), Decision::AskAgain);
            for held in &STATES[1..] {
                assert_eq!(decide(&run, Some(*held), takes_new), Decision::Leave);
            }
        }
    }

    #[test]
    fn a_keep_changes_nothing() {
        for held in STATES.map(Some).into_iter().chain([None]) {
            assert_eq!(decide(&Wish::Keep(Keep {}), held, true), Decision::Leave);
        }
    }

    #[test]
    fn a_cancel_ends_what_has_not_ended() {
        let cancel = Wish::Cancel(Cancel { grace_ms: 1500 });
        let ended = Decision::Cancel { grace: Duration::from_millis(1500) };
        for (held, decision) in [
            (None, Decision::Leave),
            (Some(HeldState::Assigned), ended.clone()),
            (Some(HeldState::Claimed), ended.clone()),
            (Some(HeldState::Running), ended),
            (Some(HeldState::Finished), Decision::Leave),
        ] {
            assert_eq!(decide(&cancel, held, true), decision, "{held:?}");
        }
    }

    #[test]
    fn a_drop_forgets_whatever_is_held() {
        assert_eq!(decide(&Wish::Drop(Drop {}), Some(HeldState::Assigned), true), Decision::ForgetUnasked);
        for held in &STATES[1..] {
            assert_eq!(decide(&Wish::Drop(Drop {}), Some(*held), true), Decision::Forget);
        }
        assert_eq!(decide(&Wish::Drop(Drop {}), None, true), Decision::Leave);
    }
}
