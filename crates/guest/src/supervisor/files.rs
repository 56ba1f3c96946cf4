//! Has files carried in and out, and tells what became of them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Instant;

use sealci_guest::wire::{FromInit, Put, Take, Taken, WireError};

use super::host::shortened;
use super::{Phase, Supervisor};
use crate::carrier::{Carrier, Work, joined};
use crate::places::{Places, home_of};
use crate::sys;

impl Supervisor {
    pub(super) fn put(&mut self, put: Put) {
        let id = put.id;
        let started = if self.phase != Phase::Waiting {
            Err("files come before the commands".to_owned())
        } else if self.carrier.is_some() {
            Err("other files are on their way".to_owned())
        } else {
            let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
            let places = Places {
                workdir: path(&put.workdir),
                home: put.home.as_deref().map_or_else(|| home_of(sys::own_uid()), path),
            };
            Carrier::put(put, places)
        };
        self.begin(id, started);
    }

    pub(super) fn take(&mut self, take: Take) {
        let id = take.id;
        let started = match &self.surroundings {
            _ if self.carrier.is_some() => Err("other files are on their way".to_owned()),
            Some(surroundings) if self.phase == Phase::Staying => {
                Carrier::take(take, surroundings.places.clone())
            }
            _ => Err("files are taken when the commands are over".to_owned()),
        };
        self.begin(id, started);
    }

    fn begin(&mut self, id: u32, started: Result<Carrier, String>) {
        match started {
            Ok(carrier) => self.carrier = Some(carrier),
            Err(why) => self.push(&FromInit::Refused { id, why: shortened(why) }),
        }
    }

    /// Pieces of what was refused come a while longer, and are nobody's.
    pub(super) fn receive(&mut self, piece: &[u8]) -> Result<(), WireError> {
        match &mut self.carrier {
            Some(carrier) => carrier.receive(piece),
            None => Ok(()),
        }
    }

    pub(super) fn end_put(&mut self) -> Result<(), WireError> {
        self.carrier.as_mut().map_or(Ok(()), Carrier::end)
    }

    /// Moves what can be moved, and tells the end.
    pub(super) fn carry(&mut self) {
        let Some(carrier) = &mut self.carrier else { return };
        carrier.pass_on();
        let has_ended = match &carrier.work {
            Work::In(_) => carrier.is_closed(),
            Work::Out(_) => match self.outbox.take_archive(&carrier.stream) {
                Ok(Some(0)) | Err(_) => true,
                Ok(_) => false,
            },
        };
        if has_ended && let Some(carrier) = self.carrier.take() {
            self.tell_result(carrier);
        }
    }

    fn tell_result(&mut self, carrier: Carrier) {
        let id = carrier.id;
        let told = match carrier.work {
            Work::In(incoming) => incoming.result().map(|unpacked| FromInit::Stored {
                id,
                files: unpacked.files,
                bytes: unpacked.bytes,
            }),
            Work::Out(thread) => joined(thread).map(|packed| {
                FromInit::Taken(Taken {
                    id,
                    files: packed.files,
                    bytes: packed.bytes,
                    missing: packed.missing,
                    specials: packed.specials,
                    unreadable: packed.unreadable,
                    unreadable_names: packed.unreadable_names,
                })
            }),
        };
        let told = told.unwrap_or_else(|why| FromInit::Refused { id, why: shortened(why) });
        self.push(&told);
    }

    /// Tells of room and of life, where it is time.
    pub(super) fn advance_files(&mut self, now: Instant) {
        let takes_more = self.outbox.takes_more();
        let Some(carrier) = &mut self.carrier else { return };
        let is_incoming = matches!(carrier.work, Work::In(_));
        let told = match carrier.room() {
            Some(bytes) => FromInit::PutRoom { bytes },
            None if !carrier.must_sign(now) || !takes_more => return,
            None if is_incoming => FromInit::PutRoom { bytes: 0 },
            None => FromInit::TakeData(&[]),
        };
        self.push(&told);
    }
}
