// The torch version that a library was built with. _library.py reads this string from the library's file, so it can
// report the version even if the library does not load.
//
// Include this header in exactly one source file of each library.
#pragma once

extern "C" __attribute__((used, visibility("default"))) const char headstart_built_with[] =
    "headstart: built with torch " HEADSTART_BUILT_WITH_TORCH;
