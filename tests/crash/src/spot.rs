//! The name of one state of a recording, so that a failure can be looked at again, and made smaller.
//!
//! ```text
//!   1234:kept:0.17,0.19/0+3       after event 1234; change 17 of file 0 whole, of change 19 its sectors 0 and 3
//! ```

use ringblock_engine::host::sim::Event;

use crate::cut::{Cut, Lengths};
use crate::enumerate::Walk;
use crate::judge::{Bad, Judge, State};
use crate::record::Recording;

/// A change that landed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Landed {
    file: usize,
    id: u64,
    /// Sectors that landed; none of them named: all.
    parts: Vec<usize>,
}

/// One state of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    /// Events that have happened.
    pub at: usize,
    lengths: Lengths,
    landed: Vec<Landed>,
}

/// The state that a cut shows.
pub(crate) fn of(cut: &Cut, lengths: Lengths) -> Spot {
    let mut landed = Vec::new();
    for (w, write) in cut.writes.iter().enumerate() {
        let parts: Vec<usize> = (0..write.count).filter(|&p| cut.part(w, p)).collect();
        if !write.landed && parts.is_empty() {
            continue;
        }
        let whole = parts.len() == write.count;
        let parts = if whole { Vec::new() } else { parts };
        landed.push(Landed { file: write.file, id: write.id, parts });
    }
    Spot { at: cut.at, lengths, landed }
}

impl Spot {
    /// Changes that landed.
    pub fn landed(&self) -> usize {
        self.landed.len()
    }

    /// Makes the cut show it. False if changes are missing there.
    fn show(&self, cut: &mut Cut) -> bool {
        cut.clear();
        let mut all = true;
        for l in &self.landed {
            let found = cut.writes.iter().position(|w| w.file == l.file && w.id == l.id);
            let Some(w) = found else {
                all = false;
                continue;
            };
            cut.set(w, true);
            if !l.parts.is_empty() {
                (0..cut.writes[w].count).for_each(|p| cut.set_part(w, p, l.parts.contains(&p)));
            }
        }
        cut.set_lengths(self.lengths);
        all
    }

    /// Simpler ones: fewer changes landed, then whole ones instead of torn ones.
    fn simpler(&self) -> Vec<Spot> {
        let mut out = Vec::new();
        for i in 0..self.landed.len() {
            let mut less = self.clone();
            less.landed.remove(i);
            out.push(less);
        }
        for i in 0..self.landed.len() {
            if !self.landed[i].parts.is_empty() {
                let mut whole = self.clone();
                whole.landed[i].parts.clear();
                out.push(whole);
            }
            for p in 0..self.landed[i].parts.len() {
                if self.landed[i].parts.len() > 1 {
                    let mut less = self.clone();
                    less.landed[i].parts.remove(p);
                    out.push(less);
                }
            }
        }
        out
    }
}

impl std::fmt::Display for Spot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lengths = match self.lengths {
            Lengths::Kept => "kept",
            Lengths::Lost => "lost",
            Lengths::Landed => "landed",
        };
        write!(f, "{}:{lengths}:", self.at)?;
        for (i, l) in self.landed.iter().enumerate() {
            write!(f, "{}{}.{}", if i > 0 { "," } else { "" }, l.file, l.id)?;
            for (j, p) in l.parts.iter().enumerate() {
                write!(f, "{}{p}", if j > 0 { "+" } else { "/" })?;
            }
        }
        Ok(())
    }
}

impl std::str::FromStr for Spot {
    type Err = String;

    fn from_str(text: &str) -> Result<Spot, String> {
        let wrong = || format!("'{text}' names no state");
        let number = |t: &str| t.parse::<u64>().map_err(|_| wrong());
        let mut parts = text.splitn(3, ':');
        let mut next = || parts.next().ok_or_else(wrong);
        let (at, lengths, list) = (number(next()?)? as usize, next()?, next()?);
        let lengths = match lengths {
            "kept" => Lengths::Kept,
            "lost" => Lengths::Lost,
            "landed" => Lengths::Landed,
            _ => return Err(wrong()),
        };
        let mut landed = Vec::new();
        for one in list.split(',').filter(|o| !o.is_empty()) {
            let (name, sectors) = one.split_once('/').unwrap_or((one, ""));
            let (file, id) = name.split_once('.').ok_or_else(wrong)?;
            let sectors = sectors.split('+').filter(|s| !s.is_empty()).map(number);
            let parts = sectors.collect::<Result<Vec<_>, _>>()?.into_iter().map(|p| p as usize).collect();
            landed.push(Landed { file: number(file)? as usize, id: number(id)?, parts });
        }
        Ok(Spot { at, lengths, landed })
    }
}

/// Looks at one state of a recording. `None` if there is no such state.
pub fn visit<T>(recording: &Recording, spot: &Spot, look: impl FnOnce(&State<'_>) -> T) -> Option<T> {
    let mut walk = Walk::new(recording, 0, 0);
    walk.go_to(spot.at);
    let mut cut = Cut::default();
    walk.load(&mut cut);
    spot.show(&mut cut).then(|| {
        let paths = walk.paths();
        look(&State { cut: &cut, paths: &paths, allowed: &walk.allowed, recording })
    })
}

/// The smallest failure that can be had from this one: fewer changes landed, whole ones instead of torn, an earlier cut.
pub fn shrink(recording: &Recording, found: (Spot, Bad), judge: &mut dyn Judge) -> (Spot, Bad) {
    let mut best = found;
    let mut judged = |spot: &Spot| visit(recording, spot, |state| judge.judge(state).err()).flatten();
    for round in 0..2 {
        while let Some(next) = best.0.simpler().into_iter().find_map(|s| judged(&s).map(|bad| (s, bad))) {
            best = next;
        }
        if round == 0 {
            let earlier =
                (recording.start + 1..best.0.at).filter(|&at| interesting(&recording.events[at - 1]));
            let found = earlier.map(|at| Spot { at, ..best.0.clone() });
            if let Some(next) = found.into_iter().find_map(|s| judged(&s).map(|bad| (s, bad))) {
                best = next;
            }
        }
    }
    best
}

fn interesting(event: &Event) -> bool {
    matches!(
        event,
        Event::Submitted { .. } | Event::GuestFlushed { .. } | Event::GuestEnded { durable: true, .. }
    )
}

/// The changes that landed, one a line.
pub fn describe(recording: &Recording, spot: &Spot) -> String {
    use ringblock_engine::host::sim::Change;
    let mut out = String::new();
    for event in &recording.events[..spot.at.min(recording.events.len())] {
        let Event::Submitted { disk, id, change } = event else { continue };
        let Some(l) = spot.landed.iter().find(|l| l.file == *disk as usize && l.id == *id) else { continue };
        let what = match change {
            Change::Data(off, data) => format!("{} bytes at {off:#x}", data.len()),
            Change::Zero(range, _) => format!("zeroes at {:#x}..{:#x}", range.start, range.end),
            Change::Len(len) => format!("length {len:#x}"),
        };
        let part = if l.parts.is_empty() { "whole".to_owned() } else { format!("sectors {:?}", l.parts) };
        out.push_str(&format!("  file {disk}: {what}, {part}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a printed state is read back. Method: both ways, and nonsense.
    #[test]
    fn names_of_states() {
        for text in ["12:kept:", "7:lost:0.17,1.19/0+3", "9:landed:2.4/1"] {
            assert_eq!(text.parse::<Spot>().unwrap().to_string(), text);
        }
        for text in ["", "x:kept:", "1:often:", "1:kept:3", "1:kept:0.1/x"] {
            assert!(text.parse::<Spot>().is_err(), "{text}");
        }
    }
}
