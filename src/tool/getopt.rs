//! Command line options as getopt_long(3) reads them.
//!
//! Options and operands may be mixed; `--` ends the options; long names may be cut to a prefix that is unique; a short
//! option's argument may be glued to it, a long one's joined with `=`. What is not declared is refused.
//!
//! ```text
//! ["-fraw", "a", "--output=json"] + [Opt] ─► Parsed { options: [("format", "raw"), ("output", "json")], operands: ["a"] }
//! ```

/// One option a command understands.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// The letter, or `'\0'` for none.
    pub short: char,
    /// The long name; also what the option is called in [`Parsed`]. A name of one letter is no long name.
    pub long: &'static str,
    /// What its argument is called in help texts; empty if it takes none.
    pub arg: &'static str,
    /// One line of help.
    pub help: &'static str,
}

/// Shorthand for tables of options.
pub const fn opt(short: char, long: &'static str, arg: &'static str, help: &'static str) -> Opt {
    Opt { short, long, arg, help }
}

/// A command line, taken apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Parsed {
    /// Long name and argument (empty for none) of each option, in order.
    pub options: Vec<(&'static str, String)>,
    /// Everything else.
    pub operands: Vec<String>,
}

/// Takes a command line apart. The error is a message without the program's name: "invalid option -- 'x'".
pub fn parse(known: &[Opt], args: &[String]) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            parsed.operands.extend(rest.cloned());
            break;
        }
        if let Some(long) = arg.strip_prefix("--") {
            parsed.options.push(long_option(known, long, &mut rest)?);
        } else if arg.len() > 1
            && let Some(letters) = arg.strip_prefix('-')
        {
            short_options(known, letters, &mut rest, &mut parsed.options)?;
        } else {
            parsed.operands.push(arg.clone());
        }
    }
    Ok(parsed)
}

fn long_option<'a>(
    known: &[Opt],
    text: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<(&'static str, String), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (text, None),
    };
    let option = find_long(known, name)?;
    match (option.arg.is_empty(), value) {
        (true, None) => Ok((option.long, String::new())),
        (true, Some(_)) => Err(format!("option '--{}' doesn't allow an argument", option.long)),
        (false, Some(value)) => Ok((option.long, value.to_owned())),
        (false, None) => match rest.next() {
            Some(value) => Ok((option.long, value.clone())),
            None => Err(format!("option '--{}' requires an argument", option.long)),
        },
    }
}

/// The option with this long name, or the only one that begins with it.
fn find_long(known: &[Opt], name: &str) -> Result<Opt, String> {
    let known = || known.iter().filter(|o| o.long.len() > 1);
    if let Some(exact) = known().find(|o| o.long == name) {
        return Ok(*exact);
    }
    let fits: Vec<_> = known().filter(|o| !name.is_empty() && o.long.starts_with(name)).collect();
    match fits[..] {
        [] => Err(format!("unrecognized option '--{name}'")),
        [one] => Ok(*one),
        _ => {
            let names: String = fits.iter().map(|o| format!(" '--{}'", o.long)).collect();
            Err(format!("option '--{name}' is ambiguous; possibilities:{names}"))
        }
    }
}

fn short_options<'a>(
    known: &[Opt],
    letters: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    found: &mut Vec<(&'static str, String)>,
) -> Result<(), String> {
    let mut chars = letters.chars();
    while let Some(letter) = chars.next() {
        let option = known.iter().find(|o| o.short == letter && letter != '\0');
        let option = option.ok_or_else(|| format!("invalid option -- '{letter}'"))?;
        if option.arg.is_empty() {
            found.push((option.long, String::new()));
            continue;
        }
        let glued = chars.as_str();
        let value = if glued.is_empty() { rest.next().cloned() } else { Some(glued.to_owned()) };
        let value = value.ok_or_else(|| format!("option requires an argument -- '{letter}'"))?;
        found.push((option.long, value));
        return Ok(());
    }
    Ok(())
}

/// Help for a table of options.
pub fn help(known: &[Opt]) -> String {
    let mut text = String::new();
    for o in known {
        let mut left = String::from("  ");
        if o.short != '\0' {
            left += &format!("-{}", o.short);
            left += if o.long.len() > 1 { ", " } else { "" };
        }
        if o.long.len() > 1 {
            left += &format!("--{}", o.long);
        }
        if !o.arg.is_empty() {
            left += &format!(" {}", o.arg);
        }
        text += &format!("{left:<34} {}\n", o.help);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[Opt] = &[
        opt('f', "format", "FMT", ""),
        opt('q', "quiet", "", ""),
        opt('U', "force-share", "", ""),
        opt('\0', "output", "OUT", ""),
    ];

    type Taken = (Vec<(&'static str, String)>, Vec<String>);

    fn run(args: &[&str]) -> Result<Taken, String> {
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).collect();
        parse(KNOWN, &args).map(|p| (p.options, p.operands))
    }

    /// Goal: every spelling of an option is understood. Method: a table.
    #[test]
    fn spellings() {
        let f = |v: &str| ("format", v.to_owned());
        for (args, options, operands) in [
            (vec!["a", "-f", "raw", "b"], vec![f("raw")], vec!["a", "b"]),
            (vec!["-qfraw"], vec![("quiet", String::new()), f("raw")], vec![]),
            (vec!["--format=raw", "--", "-f"], vec![f("raw")], vec!["-f"]),
            (vec!["--form", "raw", "-"], vec![f("raw")], vec!["-"]),
            (vec!["--force"], vec![("force-share", String::new())], vec![]),
        ] {
            let operands: Vec<String> = operands.into_iter().map(str::to_owned).collect();
            assert_eq!(run(&args), Ok((options, operands)), "{args:?}");
        }
    }

    /// Goal: texts of getopt_long. Method: one of each kind of mistake.
    #[test]
    fn mistakes() {
        for (args, want) in [
            (vec!["-x"], "invalid option -- 'x'"),
            (vec!["-f"], "option requires an argument -- 'f'"),
            (vec!["--foo"], "unrecognized option '--foo'"),
            (vec!["--format"], "option '--format' requires an argument"),
            (vec!["--quiet=1"], "option '--quiet' doesn't allow an argument"),
            (vec!["--fo"], "option '--fo' is ambiguous; possibilities: '--format' '--force-share'"),
        ] {
            assert_eq!(run(&args), Err(want.to_owned()), "{args:?}");
        }
    }
}
