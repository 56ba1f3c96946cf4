//! Gives memory that a guest reports to be free back to the host (virtio 1.2, section 5.5.6.7).
//!
//! The balloon itself stays empty: the host never asks for pages, since a guest reports by itself what it does not use. A page
//! that was reported reads as zeros afterwards, or as in the snapshot that its guest came from; the driver expects anything.

use super::{Broken, Cause, Device, Kind, Queues, sys};

const FEATURE_REPORTING: u64 = 1 << 5;

/// Drivers count the queues that are there: without statistics and hints, reports follow the first two.
const REPORTS: usize = 2;

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    /// Pages that the host asks for, always none, and those that the driver says it has given.
    config: [u8; 8],
    reports: bool,
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        FEATURE_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64, 64]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        if let (Some(at), Some(given)) = (offset.checked_sub(4), self.config.get_mut(4..))
            && let Some(field) = given.get_mut(at..at + bytes.len())
        {
            field.copy_from_slice(bytes);
        }
    }

    fn activate(&mut self, features: u64) {
        self.reports = features & FEATURE_REPORTING != 0;
    }

    fn serve(&mut self, _: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        for queue in 0..=REPORTS {
            while let Some(chain) = queues.pop(queue)? {
                if queue == REPORTS && self.reports {
                    sys::give_up(&chain.writable);
                }
                queues.push(queue, chain.head, 0)?;
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, GuestAddress};

    use super::super::driver::{DATA, Driver, Part};
    use super::*;

    const PAGE: usize = 4096;

    fn filled(features: u64) -> Driver {
        let driver = Driver::started(Balloon::default(), features);
        driver.memory.write_slice(&[7; 8 * PAGE], GuestAddress(DATA)).unwrap();
        driver
    }

    #[test]
    fn whole_pages_that_are_reported_go_back_to_the_host() {
        let mut driver = filled(FEATURE_REPORTING);
        let (page, bytes) = (PAGE as u64, PAGE as u32);
        let parts = [
            Part::Write(DATA + page, bytes),
            Part::Write(DATA + 3 * page + 1, 2 * bytes),
            Part::Write(DATA + 6 * page + 1, 5),
            Part::Write(DATA + 7 * page, 0),
        ];
        let chain = driver.offer(REPORTS, &parts);
        driver.notify(REPORTS);
        assert_eq!((driver.used(REPORTS), driver.interrupts()), (Some((chain, 0)), 1));
        let mut expected = vec![7; 8 * PAGE];
        expected[PAGE..2 * PAGE].fill(0);
        expected[4 * PAGE..5 * PAGE].fill(0);
        assert_eq!(driver.bytes(DATA, 8 * PAGE), expected);
    }

    #[test]
    fn nothing_goes_without_a_report() {
        let mut driver = filled(FEATURE_REPORTING);
        for queue in [0, 1] {
            let chain = driver.offer(queue, &[Part::Read(&[1, 0, 0, 0]), Part::Write(DATA, PAGE as u32)]);
            driver.notify(queue);
            assert_eq!(driver.used(queue), Some((chain, 0)));
        }
        let mut other = filled(0);
        other.offer(REPORTS, &[Part::Write(DATA, PAGE as u32)]);
        other.notify(REPORTS);
        for driver in [driver, other] {
            assert_eq!(driver.bytes(DATA, 8 * PAGE), [7; 8 * PAGE]);
        }
    }

    #[test]
    fn the_host_asks_for_no_pages_whatever_the_driver_writes() {
        let driver = filled(FEATURE_REPORTING);
        driver.transport.write(0x100, &[1; 4]);
        driver.transport.write(0x102, &[1; 4]);
        driver.transport.write(0x104, &[2; 4]);
        assert_eq!(driver.config(0, 8), [0, 0, 0, 0, 2, 2, 2, 2]);
    }
}
