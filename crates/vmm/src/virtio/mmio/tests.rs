use super::super::driver::{
    DATA, Driver, INDIRECT, MEMORY_BYTES, NEXT, Part, QUEUE_SIZE, VERSION_1, WRITE, memory,
};
use super::*;
use vm_memory::Bytes as _;

/// Says what was done with it, and has a configuration of 6 bytes.
struct Probe {
    config: [u8; 6],
    accepted: Option<u64>,
}

const OFFERED: u64 = 1 << 5 | 1 << 40;

impl Device for Probe {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 256]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, bytes: &[u8]) {
        self.config[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn activate(&mut self, features: u64) {
        self.accepted = Some(features);
        self.config[5] = 77;
    }

    /// Gives every chain back, with as many bytes as can be read in it.
    fn serve(&mut self, cause: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let Cause::Queue(queue) = cause else {
            queues.config_changed();
            return Ok(());
        };
        while let Some(chain) = queues.pop(queue)? {
            queues.push(queue, chain.head, chain.readable.bytes() as u32)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.accepted = None;
        self.config[5] = 0;
    }
}

fn probe() -> Probe {
    Probe { config: [1, 2, 3, 4, 5, 0], accepted: None }
}

const NEEDS: u32 = NEEDS_RESET;

#[test]
fn a_driver_finds_the_device_and_starts_it() {
    let driver = Driver::new(probe());
    assert_eq!((driver.get(0), driver.get(4), driver.get(8)), (0x7472_6976, 2, 2));
    assert_eq!((driver.get(0x70), driver.get(0xb0), driver.get(0x1000)), (0, u32::MAX, 0));
    let offered = OFFERED | VERSION_1 | 3 << 28;
    driver.set(0x14, 0);
    assert_eq!(driver.get(0x10), offered as u32);
    driver.set(0x14, 1);
    assert_eq!(driver.get(0x10), (offered >> 32) as u32);
    driver.set(0x14, 2);
    assert_eq!(driver.get(0x10), 0);
    for (queue, size) in [(0, 16), (1, 256), (2, 0), (u32::MAX, 0)] {
        driver.set(0x30, queue);
        assert_eq!(driver.get(0x34), size);
    }
    driver.negotiate(VERSION_1 | 1 << 40);
    assert_eq!(driver.get(0x70), 11);
    driver.place(0, QUEUE_SIZE);
    driver.place(1, QUEUE_SIZE);
    assert_eq!(driver.get(0x44), 1);
    driver.set(0x70, 15);
    assert_eq!((driver.get(0x70), driver.config(5, 1)), (15, vec![77]));
    driver.set(0x70, 0);
    assert_eq!((driver.get(0x70), driver.get(0x44), driver.config(5, 1)), (0, 0, vec![0]));
}

#[test]
fn features_are_refused_that_were_not_offered_or_lack_the_version() {
    for features in [VERSION_1 | 1 << 6, 1 << 5, 0] {
        let driver = Driver::new(probe());
        driver.negotiate(features);
        assert_eq!(driver.get(0x70), 3, "{features:#x}");
    }
}

#[test]
fn a_driver_that_breaks_the_order_needs_a_reset() {
    type Step = fn(&Driver);
    let wrong: &[(&str, Step)] = &[
        ("ready before its features", |driver| driver.set(0x70, 7)),
        ("a step is taken back", |driver| {
            driver.negotiate(VERSION_1);
            driver.set(0x70, 3);
        }),
        ("two steps at once", |driver| driver.set(0x70, 3)),
        ("features before it is a driver", |driver| driver.set(0x20, 0)),
        ("features after they were accepted", |driver| {
            driver.negotiate(VERSION_1);
            driver.set(0x20, 0);
        }),
        ("a queue before features", |driver| driver.set(0x38, 16)),
        ("a queue that is not there", |driver| {
            driver.negotiate(VERSION_1);
            driver.place(2, 16);
        }),
        ("a queue while the driver is ready", |driver| {
            driver.negotiate(VERSION_1);
            driver.set(0x70, 15);
            driver.place(0, 16);
        }),
        ("a queue that is ready already", |driver| {
            driver.negotiate(VERSION_1);
            driver.place(0, 16);
            driver.place(0, 16);
        }),
    ];
    for (what, step) in wrong {
        let driver = Driver::new(probe());
        step(&driver);
        assert_eq!(driver.get(0x70) & NEEDS, NEEDS, "{what}");
        assert_eq!(driver.transport.broken(), Some(Broken::OutOfOrder), "{what}");
        driver.set(0x70, 15);
        assert_eq!(driver.get(0x70) & NEEDS, NEEDS, "{what}: nothing but a reset");
        assert!(!driver.transport.run(Cause::Queue(0)));
        driver.set(0x70, 0);
        assert_eq!(driver.get(0x70), 0, "{what}");
        driver.negotiate(VERSION_1);
        assert_eq!(driver.get(0x70), 11, "{what}: after a reset all is well");
    }
}

#[test]
fn a_queue_has_a_size_and_a_place() {
    let end = MEMORY_BYTES as u64;
    let sizes = [0, 3, 32, 0x1_0010, u32::MAX];
    for size in sizes {
        let driver = Driver::new(probe());
        driver.negotiate(VERSION_1);
        driver.set(0x38, size);
        assert_eq!(driver.get(0x70) & NEEDS, NEEDS, "size {size}");
    }
    // 16 entries are 256 bytes of descriptors, 38 of what is available, and 134 of what is used.
    let places = [
        (0x1000, 0x2000, end - 134, false),
        (0x1000, 0x2000, end - 136, true),
        (0x1000, 0x2000, end - 132, false),
        (end - 256, 0x2000, 0x3000, true),
        (end - 240, 0x2000, 0x3000, false),
        (0x1008, 0x2000, 0x3000, false),
        (0x1000, 0x2001, 0x3000, false),
        (0x1000, 0x2000, 0x3002, false),
        (0x1000, 0, 0x3000, false),
        (u64::MAX - 15, 0x2000, 0x3000, false),
        (0x1000, u64::MAX - 1, 0x3000, false),
        (0x1000, 0x2000, 1 << 40, false),
    ];
    for (descriptors, available, used, is_right) in places {
        let driver = Driver::new(probe());
        driver.negotiate(VERSION_1);
        driver.set(0x38, 16);
        for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            driver.set(register, address as u32);
            driver.set(register + 4, (address >> 32) as u32);
        }
        driver.set(0x44, 1);
        assert_eq!(driver.get(0x44) == 1, is_right, "{descriptors:#x} {available:#x} {used:#x}");
        assert_eq!(driver.get(0x70) & NEEDS == 0, is_right, "{descriptors:#x} {available:#x} {used:#x}");
    }
}

#[test]
fn the_configuration_is_read_and_written_within_its_bounds() {
    let driver = Driver::started(probe(), 0);
    assert_eq!(driver.config(0, 4), [1, 2, 3, 4]);
    assert_eq!(driver.config(4, 4), [5, 77, 0, 0]);
    assert_eq!(driver.config(6, 2), [0, 0]);
    assert_eq!(driver.config(u64::MAX - 0x100, 8), [0; 8]);
    driver.transport.write(0x103, &[9, 9]);
    driver.transport.write(0x105, &[8, 8]);
    driver.transport.write(u64::MAX, &[8, 8]);
    assert_eq!(driver.config(0, 6), [1, 2, 3, 9, 9, 77]);
    // A register is 4 bytes, and nothing else reads or writes one.
    let mut two = [7; 2];
    driver.transport.read(0x70, &mut two);
    assert_eq!(two, [0; 2]);
    driver.transport.write(0x70, &[0]);
    driver.transport.write(0x71, &0u32.to_le_bytes());
    assert_eq!(driver.get(0x70), 15);
}

#[test]
fn a_change_of_the_configuration_is_told() {
    let driver = Driver::started(probe(), 0);
    let generation = driver.get(0xfc);
    driver.transport.run(Cause::Ready);
    assert_eq!((driver.get(0xfc), driver.get(0x60), driver.interrupts()), (generation + 1, 2, 1));
    driver.set(0x64, 2);
    assert_eq!(driver.get(0x60), 0);
}

#[test]
fn chains_come_back_and_the_driver_is_told() {
    let mut driver = Driver::started(probe(), 0);
    for round in 0..40u32 {
        let bytes = vec![1; round as usize + 1];
        let chain = driver.offer(1, &[Part::Read(&bytes), Part::Read(b"two"), Part::Write(DATA, 8)]);
        driver.notify(1);
        assert_eq!(driver.used(1), Some((chain, round + 4)));
        assert_eq!((driver.get(0x60), driver.interrupts()), (1, 1));
        driver.set(0x64, 1);
    }
    assert_eq!(driver.used(1), None);
}

#[test]
fn a_driver_with_event_indexes_is_told_when_it_asked() {
    const EVENT_IDX: u64 = 1 << 29;
    let mut driver = Driver::started(probe(), EVENT_IDX);
    let used_event = GuestAddress(Driver::available(0) + 4 + 2 * u64::from(QUEUE_SIZE));
    driver.memory.write_obj(2u16, used_event).unwrap();
    for told in [0, 0, 1, 0] {
        driver.offer(0, &[Part::Read(b"a")]);
        driver.notify(0);
        assert_eq!(driver.interrupts(), told);
    }
    // The device has said of which chain it wants to hear next.
    let avail_event = GuestAddress(Driver::used_ring(0) + 4 + 8 * u64::from(QUEUE_SIZE));
    assert_eq!(driver.memory.read_obj::<u16>(avail_event).unwrap(), 4);
}

#[test]
fn indirect_chains_are_followed() {
    let mut driver = Driver::started(probe(), 1 << 28);
    driver.describe(DATA, 0, DATA + 0x100, 5, NEXT, 1);
    driver.describe(DATA, 1, DATA + 0x200, 6, NEXT, 2);
    driver.describe(DATA, 2, DATA + 0x300, 7, WRITE, 0);
    driver.descriptor(0, 3, DATA, 48, INDIRECT, 0);
    driver.offer_head(0, 3);
    driver.notify(0);
    assert_eq!(driver.used(0), Some((3, 11)));
}

#[test]
fn hostile_chains_break_the_device_until_it_is_reset() {
    type Offer = fn(&mut Driver);
    let cases: &[(&str, Broken, Offer)] = &[
        ("a loop", Broken::Chain, |driver| {
            driver.descriptor(0, 0, DATA, 4, NEXT, 1);
            driver.descriptor(0, 1, DATA, 4, NEXT, 0);
            driver.offer_head(0, 0);
        }),
        ("a head beyond the table", Broken::Chain, |driver| driver.offer_head(0, QUEUE_SIZE)),
        ("a next beyond the table", Broken::Chain, |driver| {
            driver.descriptor(0, 0, DATA, 4, NEXT, 999);
            driver.offer_head(0, 0);
        }),
        ("outside of memory", Broken::Buffer, |driver| {
            driver.descriptor(0, 0, MEMORY_BYTES as u64 - 4, 5, 0, 0);
            driver.offer_head(0, 0);
        }),
        ("at the end of all addresses", Broken::Buffer, |driver| {
            driver.descriptor(0, 0, u64::MAX - 1, 4, WRITE, 0);
            driver.offer_head(0, 0);
        }),
        ("4 GiB long", Broken::Buffer, |driver| {
            driver.descriptor(0, 0, 0, u32::MAX, WRITE, 0);
            driver.offer_head(0, 0);
        }),
        ("to read after to write", Broken::Direction, |driver| {
            driver.offer(0, &[Part::Write(DATA, 4), Part::Read(b"late")]);
        }),
        ("an indirect table in an indirect table", Broken::Chain, |driver| {
            driver.describe(DATA, 0, DATA, 16, INDIRECT, 0);
            driver.descriptor(0, 0, DATA, 16, INDIRECT, 0);
            driver.offer_head(0, 0);
        }),
        ("an indirect table of half a descriptor", Broken::Chain, |driver| {
            driver.descriptor(0, 0, DATA, 24, INDIRECT, 0);
            driver.offer_head(0, 0);
        }),
        ("an empty indirect table", Broken::Chain, |driver| {
            driver.descriptor(0, 0, DATA, 0, INDIRECT, 0);
            driver.offer_head(0, 0);
        }),
        ("an indirect table outside of memory", Broken::Chain, |driver| {
            driver.descriptor(0, 0, 1 << 40, 16, INDIRECT, 0);
            driver.offer_head(0, 0);
        }),
        ("an indirect chain longer than the queue", Broken::Chain, |driver| {
            for index in 0..=QUEUE_SIZE {
                driver.describe(DATA, index, DATA, 1, if index == QUEUE_SIZE { 0 } else { NEXT }, index + 1);
            }
            driver.descriptor(0, 0, DATA, 16 * (u32::from(QUEUE_SIZE) + 1), INDIRECT, 0);
            driver.offer_head(0, 0);
        }),
        ("more available than there are entries", Broken::Ring, |driver| {
            driver.memory.write_obj(QUEUE_SIZE + 1, GuestAddress(Driver::available(0) + 2)).unwrap();
        }),
    ];
    for (what, broken, offer) in cases {
        let mut driver = Driver::started(probe(), 1 << 28);
        offer(&mut driver);
        driver.notify(0);
        assert_eq!(driver.transport.broken(), Some(*broken), "{what}");
        assert_eq!((driver.get(0x70), driver.get(0x60)), (15 | NEEDS, 2), "{what}");
        assert_eq!((driver.interrupts(), driver.used(0)), (1, None), "{what}");
        driver.set(0x70, 0);
        driver.negotiate(VERSION_1);
        assert_eq!((driver.get(0x70), driver.get(0x60)), (11, 0), "{what}");
    }
}

/// Has a guest that offers another chain for each that is taken.
struct Endless(GuestMemory);

impl Device for Endless {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16]
    }

    fn serve(&mut self, _: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        let index = GuestAddress(Driver::available(0) + 2);
        while let Some(chain) = queues.pop(0)? {
            queues.push(0, chain.head, 0)?;
            let offered: u16 = self.0.read_obj(index).unwrap();
            self.0.write_obj(offered.wrapping_add(1), index).unwrap();
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

#[test]
fn a_queue_that_never_ends_leaves_room_for_others() {
    let memory = memory();
    let mut driver = Driver::over(memory.clone(), Endless(memory));
    driver.start(0);
    driver.descriptor(0, 0, DATA, 1, WRITE, 0);
    driver.offer_head(0, 0);
    for _ in 0..3 {
        assert!(driver.transport.run(Cause::Queue(0)), "there is more to do");
        assert_eq!(driver.interrupts(), 1);
    }
}

#[test]
fn a_state_goes_on_where_it_was_taken() {
    let mut first = Driver::started(probe(), 1 << 5);
    first.offer(0, &[Part::Read(b"before")]);
    first.notify(0);
    let state = first.transport.state();
    assert_eq!(state.queues[0].next_used, 1);
    let interrupt = Arc::new(super::super::driver::Count::default());
    let again = Transport::new(Box::new(probe()), first.memory.clone(), interrupt.clone());
    again.restore(&state).unwrap();
    assert_eq!(again.state(), state);
    assert_eq!(interrupt.take(), 1, "an interrupt that the driver has not answered may have been on its way");
    first.transport = again;
    let chain = first.offer(0, &[Part::Read(b"afterwards")]);
    first.notify(0);
    first.used(0);
    assert_eq!(first.used(0), Some((chain, 10)));
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let good = Driver::started(probe(), 0).transport.state();
    type Damage = fn(&mut TransportState);
    let damages: &[Damage] = &[
        |state| state.kind = Kind::Net,
        |state| state.status = 5,
        |state| state.driver_features |= 1 << 50,
        |state| {
            state.queues.pop();
        },
        |state| state.queues[0].max_size = 32,
        |state| state.queues[0].size = 0,
        |state| state.queues[1].size = 3,
        |state| state.queues[0].used_ring = MEMORY_BYTES as u64,
        |state| state.queues[0].avail_ring = 1,
    ];
    for (index, damage) in damages.iter().enumerate() {
        let mut state = good.clone();
        damage(&mut state);
        let driver = Driver::new(probe());
        driver.transport.restore(&state).unwrap_err();
        assert_eq!(driver.get(0x70), 0, "damage {index}");
        driver.negotiate(VERSION_1);
        assert_eq!(driver.get(0x70), 11, "damage {index}: it can be used all the same");
    }
}
