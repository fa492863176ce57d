// Runs the tests registered in the other files. Any argument selects the tests whose name contains it.
#include "check.h"

int main(int argc, char** argv) {
  int ran = 0;
  for (const check::Test& test : check::tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = check::failures();
    test.body();
    ++ran;
    if (check::failures() > before) std::printf("FAILED %s\n", test.name);
  }
  std::printf("%d tests, %d failed checks\n", ran, check::failures());
  return ran == 0 || check::failures() > 0 ? 1 : 0;
}
