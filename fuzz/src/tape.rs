//! Makes tar archives out of a fuzzer's bytes: headers whose checksums are right, so that it is the rest that is tried.

use tar::Header;

use crate::Input;

/// Names that have led unpackers astray, and plain ones to meet again.
const NAMES: &[&[u8]] = &[
    b"a",
    b"b",
    b"a/b",
    b"a/b/a",
    b"a/",
    b"b/",
    b"./a",
    b".",
    b"",
    b"/",
    b"..",
    b"../outside/a",
    b"../outside/b",
    b"a/../../outside/b",
    b"a/outside/b",
    b"b/b",
    b"/outside/b",
    b"../../outside",
    b".wh.a",
    b"a/.wh.b",
    b".wh..wh..opq",
    b"a/.wh..wh..opq",
    b".wh.",
    b".wh...",
];

const KINDS: &[u8] = b"0\x001255012346750LKxxgSVMNDAX";

fn name<'a>(input: &mut Input<'a>) -> &'a [u8] {
    match input.byte() {
        255 => input.piece(),
        chosen => NAMES[usize::from(chosen) % NAMES.len()],
    }
}

/// An archive as a stranger may write it, of all that is left of the bytes.
pub fn tape(input: &mut Input<'_>) -> Vec<u8> {
    let mut archive = Vec::new();
    while !input.is_empty() {
        match input.byte() {
            // The end, and what follows it all the same.
            250 => archive.extend_from_slice(&[0; 1024]),
            251 => archive.extend_from_slice(input.piece()),
            252 => return archive,
            flags => entry(input, flags, &mut archive),
        }
    }
    archive.extend_from_slice(&[0; 1024]);
    archive
}

fn entry(input: &mut Input<'_>, flags: u8, archive: &mut Vec<u8>) {
    let kind = input.choice(KINDS);
    let path = name(input);
    let mut header = if flags & 1 == 0 { Header::new_gnu() } else { Header::new_ustar() };
    let old = header.as_old_mut();
    let length = path.len().min(old.name.len());
    old.name[..length].copy_from_slice(&path[..length]);
    old.linkflag = [kind];
    if matches!(kind, b'1' | b'2') {
        let link = name(input);
        let length = link.len().min(old.linkname.len());
        old.linkname[..length].copy_from_slice(&link[..length]);
    }
    let content = match kind {
        // What these hold is a name.
        b'L' | b'K' => [name(input), b"\0"].concat(),
        b'x' | b'g' => records(input),
        _ => input.piece().to_vec(),
    };
    header.set_size(content.len() as u64);
    header.set_mode(0o755);
    if flags & 2 != 0 {
        header.set_mode(input.number() as u32);
        header.set_mtime(input.number());
        header.set_uid(input.number());
        header.set_gid(input.number());
    }
    if flags & 4 != 0 {
        header.set_size(input.number());
    }
    if flags & 8 != 0 {
        // Anything anywhere.
        let at = usize::from(input.byte()) * 2;
        let bytes = input.piece();
        let end = (at + bytes.len()).min(512);
        header.as_mut_bytes()[at..end].copy_from_slice(&bytes[..end - at]);
    }
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(&content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

/// Records of pax whose lengths are right.
fn records(input: &mut Input<'_>) -> Vec<u8> {
    const KEYS: &[&str] = &[
        "path",
        "linkpath",
        "size",
        "mtime",
        "uid",
        "gid",
        "SCHILY.xattr.user.a",
        "SCHILY.xattr.security.capability",
        "GNU.sparse.major",
        "GNU.sparse.map",
        "GNU.sparse.name",
    ];
    let mut records = Vec::new();
    for _ in 0..input.byte() % 4 {
        let key = input.choice(KEYS);
        let value = match key {
            "path" | "linkpath" => name(input).to_vec(),
            "size" | "uid" | "gid" | "mtime" => input.number().to_string().into_bytes(),
            _ => input.piece().to_vec(),
        };
        // The length counts itself.
        let body = key.len() + value.len() + 3;
        let digits = (body + (body + 3).to_string().len()).to_string();
        records.extend_from_slice(format!("{digits} {key}=").as_bytes());
        records.extend_from_slice(&value);
        records.push(b'\n');
    }
    records
}
