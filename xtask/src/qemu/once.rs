//! Has QEMU's emulation deliver an interrupt that KVM injects into a guest once.
//!
//! Its `helper_vmrun` leaves the injected vector where its main loop finds it again, and delivers it a second time when something
//! makes it leave that loop before the guest's next exit: within the handler, also where interrupts are off. A kernel that is
//! interrupted so under a lock that the handler takes stands still for ever. So each entry that injects is left again at once,
//! before the guest's next instruction: an interrupt of the host's own is made to wait for it. KVM does the same where it wants
//! an immediate exit.
//!
//! ```text
//!   kvm:kvm_inj_virq ─▶ flag = 1
//!   kvm:kvm_entry    ─▶ flag was 1: a sample, whose reader is woken ─▶ the kernel's `irq_work` ─▶ an interrupt to itself
//! ```
//! Interrupts are off at `kvm_entry`, so that one comes with the entry. Nobody reads the samples: they write over one another.
//! What it has attached goes with it, so it goes on until it is killed. A processor that is not emulated is left alone. It is for
//! a machine with one processor, and built without crates.

use std::arch::x86_64::__cpuid;
use std::ffi::{c_int, c_long, c_void};
use std::fs;
use std::io;

unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(file: c_int, request: u64, ...) -> c_int;
    fn mmap(
        at: *mut c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
}

/// Of leaf 1, ECX: there is something beneath.
const HYPERVISOR: u32 = 1 << 31;
/// The leaf with its name.
const HYPERVISOR_NAME: u32 = 0x4000_0000;

const SYS_PERF_EVENT_OPEN: c_long = 298;
const SYS_BPF: c_long = 321;
const PAGE: usize = 4096;

// linux/bpf.h
const MAP_CREATE: c_long = 0;
const PROG_LOAD: c_long = 5;
const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_TRACEPOINT: u32 = 5;
const MAP_LOOKUP: i32 = 1;
// linux/perf_event.h
const TYPE_TRACEPOINT: u32 = 2;
const IOC_ENABLE: u64 = 0x2400;
const IOC_SET_BPF: u64 = 0x4004_2408;

/// One instruction: code, target and source registers, offset, value.
type Instruction = (u8, u8, u8, i16, i32);

/// With the flag's address in r0, the first sets it, and wants no sample.
const SET: [Instruction; 2] = [
    (0x62, 0, 0, 0, 1), // flag = 1
    (0xb7, 0, 0, 0, 0), // r0 = 0
];
/// The second takes it back, and wants a sample where it was set.
const TAKE: [Instruction; 3] = [
    (0x61, 1, 0, 0, 0), // r1 = flag
    (0x62, 0, 0, 0, 0), // flag = 0
    (0xbf, 0, 1, 0, 0), // r0 = r1
];

fn main() {
    if !is_emulated() {
        println!("the processor is not emulated");
        return;
    }
    match deliver_once() {
        Ok(()) => println!("interrupts are delivered once"),
        Err(error) => {
            println!("interrupts may be delivered twice: {error}");
            std::process::exit(1);
        }
    }
    loop {
        std::thread::park();
    }
}

/// Whether QEMU says that it is what is beneath.
fn is_emulated() -> bool {
    let name = __cpuid(HYPERVISOR_NAME);
    let name = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
    __cpuid(1).ecx & HYPERVISOR != 0 && name.as_flattened() == b"TCGTCGTCGTCG"
}

fn deliver_once() -> io::Result<()> {
    let map = create_map()?;
    let injected = attach("kvm_inj_virq", &flag_and(map, &SET))?;
    let entered = attach("kvm_entry", &flag_and(map, &TAKE))?;
    // Readable only: what nobody has read is written over. The first page is the kernel's.
    let place = unsafe { mmap(std::ptr::null_mut(), 3 * PAGE, 1, 1, entered, 0) };
    if place as isize == -1 {
        return Err(io::Error::last_os_error());
    }
    for event in [injected, entered] {
        if unsafe { ioctl(event, IOC_ENABLE, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A program that finds the flag, and does this; it ends with what is in r0 then.
fn flag_and(map: c_int, work: &[Instruction]) -> Vec<Instruction> {
    let mut program = vec![
        (0x18, 1, 1, 0, map), // r1 = the map
        (0x00, 0, 0, 0, 0),
        (0x62, 10, 0, -4, 0), // key = 0
        (0xbf, 2, 10, 0, 0),  // r2 = its address
        (0x07, 2, 0, 0, -4),
        (0x85, 0, 0, 0, MAP_LOOKUP),
        (0x55, 0, 0, 1, 0), // found
        (0x95, 0, 0, 0, 0),
    ];
    program.extend(work);
    program.push((0x95, 0, 0, 0, 0));
    program
}

fn checked(result: c_long) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}

fn create_map() -> io::Result<c_int> {
    // Its type; bytes of a key and of a value; entries.
    let words: [u32; 4] = [MAP_TYPE_ARRAY, 4, 4, 1];
    checked(unsafe { syscall(SYS_BPF, MAP_CREATE, words.as_ptr(), size_of_val(&words)) })
}

/// Runs a program where KVM says this; the event, off.
fn attach(name: &str, program: &[Instruction]) -> io::Result<c_int> {
    let code: Vec<u8> = program
        .iter()
        .flat_map(|(code, to, from, offset, value)| {
            let mut bytes = vec![*code, to | from << 4];
            bytes.extend(offset.to_le_bytes());
            bytes.extend(value.to_le_bytes());
            bytes
        })
        .collect();
    let license = c"GPL";
    let mut words = [0u64; 6];
    words[0] = u64::from(PROG_TYPE_TRACEPOINT) | (program.len() as u64) << 32;
    words[1] = code.as_ptr() as u64;
    words[2] = license.as_ptr() as u64;
    let loaded = checked(unsafe { syscall(SYS_BPF, PROG_LOAD, words.as_ptr(), size_of_val(&words)) })?;

    let id = fs::read_to_string(format!("/sys/kernel/tracing/events/kvm/{name}/id"))?;
    let id: u64 = id.trim().parse().map_err(io::Error::other)?;
    // Of `perf_event_attr`: type and size, config, period, sample_type, read_format, flags, wakeup_events.
    let mut attributes = [0u64; 8];
    attributes[0] = u64::from(TYPE_TRACEPOINT) | (size_of_val(&attributes) as u64) << 32;
    attributes[1] = id;
    attributes[2] = 1;
    attributes[5] = 1; // disabled
    attributes[6] = 1;
    let (everybody, first_cpu, no_group, flags): (c_int, c_int, c_int, u64) = (-1, 0, -1, 0);
    let event = checked(unsafe {
        syscall(SYS_PERF_EVENT_OPEN, attributes.as_ptr(), everybody, first_cpu, no_group, flags)
    })?;
    if unsafe { ioctl(event, IOC_SET_BPF, loaded) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(event)
}
