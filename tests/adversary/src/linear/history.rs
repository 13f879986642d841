//! Histories: what clients asked for, when it began and ended, and what they found; cut into cells and checked.
//!
//! ```text
//!   disk:   [m|cell 0|m][m|cell 1|m] …        one cell a stride, at most one sector; m: margins that nobody looks at
//!   cell:   stamp(op, cell), then check words that follow from it; all zeroes is the value 0
//! ```
//!
//! Invariants: an operation's number is the time at which it began, so it is unique; every cell is a register of its own
//! ([`super::register`]); a cell never crosses a sector, so nothing below may tear it. Requests begin and end anywhere in
//! margins, so that they need not be aligned to anything.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use super::register::{self, Act, Event, NEVER, Why};

/// The first number of an operation; lower ones stand for what was there at the beginning.
pub const FIRST: u64 = 16;
/// Bits of a stamp that say which cell it is for.
const CELL_BITS: u32 = 20;
/// Between the check words of a cell.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// A value that is none.
const BAD: u64 = 1 << 63;

/// Where cells lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grid {
    /// Bytes from one cell to the next: a power of two, at most 512.
    pub stride: u64,
    /// Bytes at each end of a stride that belong to no cell.
    pub margin: u64,
    /// Number of cells.
    pub cells: u32,
}

/// What was found in a cell that is no value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bad {
    /// The cell.
    pub cell: u32,
    /// What it looks like.
    pub what: String,
    /// Whether it is a mixture of values, all of this very cell.
    pub torn: bool,
}

impl Grid {
    /// Bytes of all cells.
    pub fn size(&self) -> u64 {
        u64::from(self.cells) * self.stride
    }

    /// Bytes of these cells, from the first one's data to the last one's.
    pub fn bytes(&self, first: u32, count: u32) -> (u64, u64) {
        let start = u64::from(first) * self.stride + self.margin;
        (start, u64::from(count) * self.stride - 2 * self.margin)
    }

    fn word(id: u64, cell: u32, k: u64) -> u64 {
        (id << CELL_BITS | u64::from(cell)).wrapping_add(k.wrapping_mul(STEP))
    }

    /// Fills the cells that lie wholly in `off..off + buf.len()` with the value `id`, margins with anything.
    pub fn fill(&self, id: u64, off: u64, buf: &mut [u8]) {
        buf.fill(0xee);
        let end = off + buf.len() as u64;
        let first = off.saturating_sub(self.margin).div_ceil(self.stride);
        for cell in first.. {
            let start = cell * self.stride + self.margin;
            let stop = (cell + 1) * self.stride - self.margin;
            if stop > end {
                break;
            }
            let data = &mut buf[(start - off) as usize..(stop - off) as usize];
            for (k, w) in data.chunks_mut(8).enumerate() {
                let n = w.len();
                w.copy_from_slice(&Grid::word(id, cell as u32, k as u64).to_le_bytes()[..n]);
            }
        }
    }

    /// The values of cells in data that was read from `off`.
    pub fn decode(&self, first: u32, count: u32, off: u64, buf: &[u8], bad: &mut Vec<Bad>) -> Box<[u64]> {
        let one = |cell: u32| {
            let start = u64::from(cell) * self.stride + self.margin - off;
            let data = &buf[start as usize..(start + self.stride - 2 * self.margin) as usize];
            value(cell, data).unwrap_or_else(|found| {
                bad.push(found);
                BAD
            })
        };
        (first..first + count).map(one).collect()
    }
}

fn read_word(data: &[u8]) -> u64 {
    let mut word = [0; 8];
    let n = data.len().min(8);
    word[..n].copy_from_slice(&data[..n]);
    u64::from_le_bytes(word)
}

/// The value of a cell.
fn value(cell: u32, data: &[u8]) -> Result<u64, Bad> {
    let head = read_word(data);
    let (id, of) = (head >> CELL_BITS, (head & ((1 << CELL_BITS) - 1)) as u32);
    let mut whole = data.chunks(8).enumerate();
    if head == 0 && data.iter().all(|&b| b == 0) {
        return Ok(0);
    }
    if whole.all(|(k, w)| *w == Grid::word(id, of, k as u64).to_le_bytes()[..w.len()]) && id > 0 {
        if of == cell {
            return Ok(id);
        }
        return Err(Bad { cell, what: format!("data of op {id} for cell {of}"), torn: false });
    }
    let mut parts: Vec<String> = Vec::new();
    let mut torn = true;
    for (k, w) in data.chunks(8).enumerate().filter(|(_, w)| w.len() == 8) {
        let word = read_word(w).wrapping_sub((k as u64).wrapping_mul(STEP));
        let (id, of) = (word >> CELL_BITS, word & ((1 << CELL_BITS) - 1));
        let part = match (read_word(w), of == u64::from(cell)) {
            (0, _) => "zeroes".to_owned(),
            (_, true) => format!("op {id}"),
            _ => {
                torn = false;
                format!("{:#x}", read_word(w))
            }
        };
        if parts.last() != Some(&part) {
            parts.push(part);
        }
    }
    parts.truncate(8);
    Err(Bad { cell, what: format!("a mixture: {}", parts.join(", ")), torn })
}

/// What an operation was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A read.
    Read,
    /// A write, perhaps with FUA.
    Write,
    /// A write of a buffer of zeroes.
    WriteZeroBuffer,
    /// Write-zeroes, perhaps with unmapping.
    Zero,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// With success.
    Done,
    /// With an error that the faults explain: it took effect before that, or not at all.
    Failed,
    /// Without an answer: it takes effect some time before this, or not at all ([`NEVER`]: at any time).
    Lost(u64),
}

/// One operation of a client.
#[derive(Clone, Debug)]
pub struct Op {
    /// Its number, which is when it began.
    pub id: u64,
    /// When it ended.
    pub end: u64,
    /// Who asked.
    pub client: u32,
    /// What.
    pub kind: Kind,
    /// The first cell.
    pub first: u32,
    /// Number of cells.
    pub count: u32,
    /// How it ended.
    pub fate: Fate,
    /// What a read found.
    pub found: Box<[u64]>,
    /// What of it was no value.
    pub bad: Vec<Bad>,
}

/// Gives every event a time of its own.
#[derive(Debug)]
pub struct Clock(AtomicU64);

impl Default for Clock {
    fn default() -> Clock {
        Clock(AtomicU64::new(FIRST))
    }
}

impl Clock {
    /// The next moment.
    pub fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

/// What is known of a source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// A read may see parts of a change that is under way at the same time: the host's page cache copies while others look.
    pub torn_while_changing: bool,
}

/// What a check has looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Looked {
    /// Operations.
    pub ops: u64,
    /// Operations on cells.
    pub events: u64,
    /// Mixtures that the rules allow.
    pub torn: u64,
    /// Operations that failed or were never answered.
    pub unsure: u64,
}

/// Checks all operations on a disk whose cells held `initial`. An error is the story of one cell.
pub fn check(grid: &Grid, initial: &[u64], ops: &[Op], rules: Rules) -> Result<Looked, String> {
    let mut cells: Vec<Vec<(Event, usize)>> = vec![Vec::new(); grid.cells as usize];
    let mut looked = Looked { ops: ops.len() as u64, ..Looked::default() };
    for (at, op) in ops.iter().enumerate() {
        looked.unsure += u64::from(op.fate != Fate::Done);
        if let Some(cell) = op.bad.iter().find(|b| !(rules.torn_while_changing && is_shown(op, b, ops))) {
            return Err(story(cell.cell, at, &cell.what, initial, ops));
        }
        looked.torn += op.bad.len() as u64;
        for (i, cell) in (op.first..op.first + op.count).enumerate() {
            if let Some(event) = act(op, i) {
                cells[cell as usize].push((event, at));
                looked.events += 1;
            }
        }
    }
    let mut events = Vec::new();
    for (cell, list) in cells.iter().enumerate() {
        events.clear();
        events.extend(list.iter().map(|(e, _)| *e));
        if let Err((at, why)) = register::check(initial[cell], &events) {
            let what = match why {
                Why::Phantom => "data that nobody wrote to this cell",
                Why::NoOrder => "no order of the operations explains it",
                Why::Undecided => "too many operations at once to decide",
            };
            return Err(story(cell as u32, list[at].1, what, initial, ops));
        }
    }
    Ok(looked)
}

/// What an operation means for its `i`-th cell.
fn act(op: &Op, i: usize) -> Option<Event> {
    let value = if op.kind == Kind::Write { op.id } else { 0 };
    let act = match (op.kind, op.fate) {
        (Kind::Flush, _) => return None,
        (Kind::Read, Fate::Done) => match op.found[i] {
            BAD => return None,
            v => Act::Read(v),
        },
        (Kind::Read, _) => return None,
        (Kind::Discard, _) => Act::Maybe(0),
        (_, Fate::Done) => Act::Write(value),
        _ => Act::Maybe(value),
    };
    let end = match op.fate {
        Fate::Lost(end) => end,
        _ => op.end,
    };
    Some(Event { act, start: op.id, end })
}

/// Whether a mixture is explained by a change of the cell at the same time.
fn is_shown(read: &Op, bad: &Bad, ops: &[Op]) -> bool {
    let changes = |o: &&Op| {
        let end = if let Fate::Lost(end) = o.fate { end } else { o.end };
        !matches!(o.kind, Kind::Read | Kind::Flush)
            && (o.first..o.first + o.count).contains(&bad.cell)
            && o.id < read.end
            && read.id < end
    };
    bad.torn && ops.iter().any(|o| changes(&o))
}

/// The operations on a cell around one of them, in order of time.
fn story(cell: u32, at: usize, what: &str, initial: &[u64], ops: &[Op]) -> String {
    let culprit = &ops[at];
    let mut out = format!("cell {cell}: {what} (op {})\n", culprit.id);
    let on_cell = |o: &&Op| (o.first..o.first + o.count).contains(&cell) && o.kind != Kind::Flush;
    let mut near: Vec<&Op> = ops.iter().filter(on_cell).filter(|o| o.id <= culprit.end).collect();
    near.sort_by_key(|o| o.id);
    let seen = near.iter().rposition(|o| o.id == culprit.id).unwrap_or(0);
    let found = culprit.found.get((cell - culprit.first.min(cell)) as usize).copied();
    // the write whose data was found, however long ago
    let from = near.iter().position(|o| Some(o.id) == found && o.kind == Kind::Write);
    let start = seen.saturating_sub(20);
    if let Some(from) = from.filter(|f| *f < start) {
        let _ = writeln!(out, "  {}\n  …", line(near[from], cell));
    }
    if start == 0 {
        let _ = writeln!(out, "  at first: {}", initial[cell as usize]);
    }
    for o in &near[start..] {
        let mark = if o.id == culprit.id { '>' } else { ' ' };
        let _ = writeln!(out, "{mark} {}", line(o, cell));
    }
    out
}

fn line(o: &Op, cell: u32) -> String {
    let end = match o.fate {
        Fate::Lost(NEVER) => "never".to_owned(),
        Fate::Lost(end) => format!("before {end}"),
        _ => o.end.to_string(),
    };
    let found = match (o.kind, o.found.get((cell - o.first) as usize)) {
        (Kind::Read, Some(&BAD)) => " found a mixture".to_owned(),
        (Kind::Read, Some(v)) => format!(" found {v}"),
        _ => String::new(),
    };
    let fate = if o.fate == Fate::Failed { " failed" } else { "" };
    let cells = o.first..o.first + o.count;
    format!("{:>8} .. {end:<8} client {:<3} {:?} cells {cells:?}{found}{fate}", o.id, o.client, o.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRID: Grid = Grid { stride: 512, margin: 0, cells: 8 };

    fn op(id: u64, end: u64, kind: Kind, found: &[u64]) -> Op {
        let (fate, bad) = (Fate::Done, Vec::new());
        Op { id, end, client: 0, kind, first: 2, count: 1, fate, found: found.into(), bad }
    }

    fn reading(id: u64, data: &[u8]) -> Op {
        let mut bad = Vec::new();
        let found = GRID.decode(2, 1, 1024, data, &mut bad);
        Op { found, bad, ..op(id, id + 1, Kind::Read, &[]) }
    }

    fn judge(ops: &[Op]) -> Result<Looked, String> {
        check(&GRID, &[0; 8], ops, Rules::default())
    }

    /// Goal: torn sectors, data of other sectors, data from nowhere and stale data are caught; what was written is
    /// accepted. Method: data made by hand, and the same data damaged.
    #[test]
    fn bad_data_is_caught() {
        let mut old = vec![0; 512];
        let mut new = vec![0; 512];
        GRID.fill(20, 1024, &mut old);
        GRID.fill(30, 1024, &mut new);
        let writes = [op(20, 21, Kind::Write, &[]), op(30, 31, Kind::Write, &[])];
        let with = |read: Op| judge(&[&writes[..], &[read]].concat());
        assert!(with(reading(40, &new)).is_ok());
        assert!(with(reading(40, &old)).unwrap_err().contains("no order"));
        let mut torn = new.clone();
        torn[256..].copy_from_slice(&old[256..]);
        assert!(with(reading(40, &torn)).unwrap_err().contains("a mixture: op 30, op 20"));
        let mut half = new.clone();
        half[..8].fill(0);
        assert!(with(reading(40, &half)).unwrap_err().contains("a mixture: zeroes, op 30"));
        let mut flipped = new.clone();
        flipped[300] ^= 1;
        assert!(with(reading(40, &flipped)).is_err());
        let mut alien = vec![0; 512];
        GRID.fill(30, 1536, &mut alien);
        assert!(with(reading(40, &alien)).unwrap_err().contains("data of op 30 for cell 3"));
        let mut nobody = vec![0; 512];
        GRID.fill(25, 1024, &mut nobody);
        assert!(with(reading(40, &nobody)).unwrap_err().contains("nobody wrote"));
        assert!(with(reading(40, &[0; 512])).is_err(), "zeroes that nobody wrote");
    }

    /// Goal: the page cache excuses a mixture only while the cell changes. Method: a write around the read, and before it.
    #[test]
    fn the_page_cache_excuses_little() {
        let mut data = vec![0; 512];
        GRID.fill(20, 1024, &mut data);
        data[256..].fill(0);
        let rules = Rules { torn_while_changing: true };
        for (end, good) in [(50, true), (39, false)] {
            let ops = [op(20, end, Kind::Write, &[]), reading(40, &data)];
            assert_eq!(check(&GRID, &[0; 8], &ops, rules).is_ok(), good);
            assert!(judge(&ops).is_err());
        }
    }

    /// Goal: cells with margins come back from data of any offset. Method: fill and decode around them.
    #[test]
    fn margins() {
        let grid = Grid { stride: 64, margin: 4, cells: 64 };
        let (start, len) = grid.bytes(3, 5);
        for (before, after) in [(0, 0), (3, 1), (4, 4)] {
            let mut buf = vec![0; (before + len + after) as usize];
            grid.fill(77, start - before, &mut buf);
            let mut bad = Vec::new();
            assert_eq!(&*grid.decode(3, 5, start - before, &buf, &mut bad), [77; 5]);
            assert!(bad.is_empty());
        }
    }
}
