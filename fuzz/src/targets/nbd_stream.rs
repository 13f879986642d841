//! Pieces of an NBD client's stream, as a client in its senses writes them.

/// An option of the option phase.
pub(super) fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut o = b"IHAVEOPT".to_vec();
    o.extend(kind.to_be_bytes());
    o.extend((data.len() as u32).to_be_bytes());
    o.extend(data);
    o
}

/// The payload of NBD_OPT_GO and NBD_OPT_INFO for the export "d".
pub(super) fn go() -> Vec<u8> {
    [&1u32.to_be_bytes()[..], b"d", &0u16.to_be_bytes()].concat()
}

/// The payload that selects both contexts of the export "d".
pub(super) fn meta() -> Vec<u8> {
    let query = |name: &[u8]| [&(name.len() as u32).to_be_bytes()[..], name].concat();
    let queries = [query(b"base:allocation"), query(b"qemu:allocation-depth")].concat();
    [&1u32.to_be_bytes()[..], b"d", &2u32.to_be_bytes(), &queries].concat()
}

/// How requests and replies are framed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    /// The oldest way in.
    Simple,
    /// Structured replies and contexts.
    Structured,
    /// Extended headers and contexts.
    Extended,
}

/// A whole option phase that leads into transmission.
pub(super) fn handshake(mode: Mode) -> Vec<u8> {
    let flags = 3u32.to_be_bytes().to_vec();
    match mode {
        Mode::Simple => [flags, option(1, b"d")].concat(),
        Mode::Structured => [flags, option(8, b""), option(10, &meta()), option(7, &go())].concat(),
        Mode::Extended => [flags, option(11, b""), option(10, &meta()), option(7, &go())].concat(),
    }
}

/// A request without its payload.
pub(super) fn request(mode: Mode, flags: u16, ty: u16, cookie: u64, off: u64, len: u64) -> Vec<u8> {
    let mut v = match mode {
        Mode::Extended => 0x21e4_1c71u32,
        _ => 0x2560_9513u32,
    }
    .to_be_bytes()
    .to_vec();
    v.extend(flags.to_be_bytes());
    v.extend(ty.to_be_bytes());
    v.extend(cookie.to_be_bytes());
    v.extend(off.to_be_bytes());
    match mode {
        Mode::Extended => v.extend(len.to_be_bytes()),
        _ => v.extend((len as u32).to_be_bytes()),
    }
    v
}
